"""What a pass of the target multiplies, from what is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosched.protocols import TargetInfo


def layer_and_head(target: TargetInfo) -> tuple[int, int]:
    """Weights of one of its layers, and of its head.

    A layer of width H has about 12 H^2 (Kaplan et al., arXiv 2001.08361), the head of V words V H.
    """
    return 12 * target.hidden_size**2, target.vocab_size * target.hidden_size
