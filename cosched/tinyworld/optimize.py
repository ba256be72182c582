"""The optimizer of the tiny world: Muon for matrices, AdamW for the rest, one clipped step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

Optimizers = tuple[torch.optim.Optimizer, ...]


def muon_and_adamw(network: nn.Module, weight_decay: float) -> Optimizers:
    """Muon over inner matrices; AdamW over vectors, embeddings and heads, without decay."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    return (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=weight_decay),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )


def take_step(
    loss: Tensor, parameters: Iterable[nn.Parameter], optimizers: Optimizers, rate: float
) -> None:
    """Backward, clip to norm 1, and step at that learning rate."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
