"""The names of arms: what one says about how it decodes.

``plain`` has no draft, ``frozen`` a draft as it was loaded, ``adapted`` one that learns as the
section ``adapt`` says. Any other name is a variant: it learns as ``variants.NAME`` says. With
``+window`` behind it the draft sees only its last tokens.
"""

from __future__ import annotations

import re

PLAIN, FROZEN, ADAPTED = BASE_ARMS = ("plain", "frozen", "adapted")
WINDOW_SUFFIX = "+window"
# What may name a folder on every system, and cannot be taken for an arm with a window.
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def split_arm(arm: str) -> tuple[str, bool]:
    """``frozen+window`` is ``("frozen", True)``."""
    base = arm.removesuffix(WINDOW_SUFFIX)
    return base, base != arm


def adapts(arm: str) -> bool:
    """Whether the arm's draft learns."""
    return split_arm(arm)[0] not in {PLAIN, FROZEN}


def control_of(arm: str) -> str:
    """The frozen arm that sees the same window."""
    return FROZEN + WINDOW_SUFFIX if split_arm(arm)[1] else FROZEN
