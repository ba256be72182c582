"""Gradients clipped to a norm, and steps that must not be taken, without asking the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL = 1e-6  # added to the norm, as DeepSpeed and torch do


@torch.no_grad()
def clip_finite(gradients: Sequence[Tensor], loss: Tensor, max_norm: float) -> Tensor:
    """Scale the gradients in place to ``max_norm`` at most, all together.

    Returns 1 where the loss or a gradient is not finite, else 0, in float32 on their device: a fused
    optimizer that is given it as ``found_inf`` takes no step then.
    """
    if not gradients:
        return (~loss.isfinite()).float()
    norms = torch.stack(torch._foreach_norm(gradients, 2.0))
    norm = norms.float().square().sum().sqrt()
    scale = (norm.new_full((), max_norm) / (norm + SMALL)).clamp_max(1.0)
    torch._foreach_mul_(gradients, scale)
    return (~(loss.isfinite() & norm.isfinite())).float()
