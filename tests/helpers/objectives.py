"""Experts as a file writes them: one that is good, one at a rate that ruins a draft in a step."""

from __future__ import annotations

from typing import Any

GOOD, ABSURD = "{lr: 3.0e-4}", "{lr: 30.0}"


def experts(*each: str, **fields: Any) -> str:
    more = "".join(f", {name}: {value}" for name, value in fields.items())
    return f"adapt.objective={{kind: hedge, experts: [{', '.join(each)}]{more}}}"
