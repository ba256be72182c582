"""The names of arms: what one says about how it decodes.

``plain`` has no draft, ``frozen`` a draft as it was loaded, ``adapted`` one that learns as the
section ``adapt`` says. Any other name is a variant: it learns as ``variants.NAME`` says. With
``+window`` behind it the draft sees only its last tokens. With ``NAME.`` before it the draft is that
of ``drafts.NAME``, as in ``pard.frozen+window``; a dot may stand in a folder's name on every system,
and in no name of a variant or a draft.
"""

from __future__ import annotations

import re

PLAIN, FROZEN, ADAPTED = BASE_ARMS = ("plain", "frozen", "adapted")
WINDOW_SUFFIX = "+window"
DRAFT_MARK = "."
# What may name a folder on every system, and cannot be taken for an arm with a window or a draft.
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def split_arm(arm: str) -> tuple[str, bool]:
    """``frozen+window`` is ``("frozen", True)``, whichever draft it has."""
    own = arm.partition(DRAFT_MARK)[2] if DRAFT_MARK in arm else arm
    base = own.removesuffix(WINDOW_SUFFIX)
    return base, base != own


def draft_of(arm: str) -> str | None:
    """Which of ``drafts`` it has; None where it names none, so that it has the ``drafter``."""
    return arm.partition(DRAFT_MARK)[0] if DRAFT_MARK in arm else None


def beside(arm: str, other: str) -> str:
    """The arm ``other`` of the same draft."""
    draft = draft_of(arm)
    return other if draft is None else f"{draft}{DRAFT_MARK}{other}"


def adapts(arm: str) -> bool:
    """Whether the arm's draft learns."""
    return split_arm(arm)[0] not in {PLAIN, FROZEN}


def control_of(arm: str) -> str:
    """The frozen arm of the same draft that sees the same window."""
    return beside(arm, FROZEN + WINDOW_SUFFIX if split_arm(arm)[1] else FROZEN)
