"""The optimizer of the tiny world: Muon for matrices, AdamW for the rest, one clipped step.

Both it and the forward pass compute in bfloat16, where the processor does; products in bfloat16 are
tens of times slower than in float32 on one that does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosched.training.precision import has_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterable

Optimizers = tuple[torch.optim.Optimizer, ...]
BETAS = (0.9, 0.95)


def make_optimizers(network: nn.Module, weight_decay: float) -> Optimizers:
    """Muon over inner matrices; AdamW over vectors, embeddings and heads, without decay.

    Torch's Muon computes in bfloat16 whatever the weights are; without that AdamW has them all.
    """
    if not has_bfloat16():
        parameters = list(network.parameters())
        return (torch.optim.AdamW(parameters, betas=BETAS, weight_decay=weight_decay),)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    return (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=weight_decay),
        torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0),
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


def rate_share(step: int, done: float, warmup_steps: int, decay_share: float) -> float:
    """What a learning rate is multiplied by at a step: it rises, stays, and falls to zero.

    ``done`` is the share of the training that is done, ``decay_share`` how much of it the fall takes.
    """
    return min((step + 1) / warmup_steps, (1 - done) / decay_share, 1)
