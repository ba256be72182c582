"""Layers that the families share, under the tensor names of the public checkpoints.

Letters: leading dimensions are free (``...``), E model width, I inner width, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` with the mean square in float32, as the public models do."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Written out: torch's rms_norm takes three times as long on a CPU for a row or two.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (wide * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Rotary(nn.Module):
    """Rotary position embedding, half rotation (the Llama convention), from a growing table."""

    table_TD: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.register_buffer("table_TD", torch.empty(0, head_dim), persistent=False)

    def reserve(self, length: int) -> None:
        """Make the table long enough for positions below ``length``."""
        if length <= len(self.table_TD):
            return
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.arange(length, dtype=torch.float64)[:, None] * self.theta**-exponent
        table = torch.cat((angles.cos(), angles.sin()), -1)
        self.table_TD = table.to(self.table_TD.device, self.table_TD.dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x [..., heads, D]`` at ``positions [...]``, which must be reserved."""
        cos, sin = self.table_TD[positions].unsqueeze(-2).to(x.dtype).chunk(2, -1)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
