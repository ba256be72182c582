"""A trainer for a process of its own whose update takes longer than any test."""

from __future__ import annotations

import time
from typing import Any

import torch


def build() -> Any:
    return _Busy(), None


class _Busy:
    def weights(self) -> Any:
        return {"w": torch.zeros(1)}

    def update(self, *_: Any) -> None:
        time.sleep(600)
