"""Gradients clipped to a norm, and steps that must not be taken, without asking the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@torch.no_grad()
def clip_finite(parameters: Sequence[Tensor], loss: Tensor, max_norm: float) -> Tensor:
    """Scale their gradients in place to ``max_norm`` at most, all together.

    Returns 1 where the loss or a gradient is not finite, else 0, in float32 on their device: a fused
    optimizer that is given it as ``found_inf`` takes no step then.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return (~loss.isfinite()).float()
    norm = get_total_norm(gradients)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return (~(loss.isfinite() & norm.isfinite())).float()
