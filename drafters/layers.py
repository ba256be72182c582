"""Layers that the families share, under the tensor names of the public checkpoints.

Letters: leading dimensions are free (``...``), E model width, I inner width, X width of what
queries, keys and values are made of, H key-value heads, J query heads, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drafters.config import DecoderConfig


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
    """Rotary position embedding, half rotation (the Llama convention), from a growing table.

    The table is no buffer: it stays in float32 when the network is cast, so a float32 copy of a
    bfloat16 draft rotates exactly. Shorter ones of before stay where they are: a CUDA graph that was
    captured with one goes on reading it.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._config = config
        self.table_TD = torch.empty(0, config.width_of_head, device="cpu")
        self._shorter: list[Tensor] = []

    def reserve(self, length: int) -> None:
        """Make the table long enough for positions below ``length``; it doubles, so this is rare."""
        if length <= len(self.table_TD):
            return
        length = max(length, 2 * len(self.table_TD))
        with torch.device("cpu"):
            frequencies, factor = self._config.inverse_frequencies()
            angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
            table = torch.cat((angles.cos(), angles.sin()), -1) * factor
        self._shorter.append(self.table_TD)
        self.table_TD = table.to(self.table_TD.device, torch.float32)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x [..., heads, D]`` at ``positions [...]``, which must be reserved."""
        if self.table_TD.device != positions.device:
            self.table_TD = self.table_TD.to(positions.device)
        cos, sin = self.table_TD[positions].unsqueeze(-2).to(x.dtype).chunk(2, -1)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    """Projections, per-head norms and rotation; who sees whom is left to the caller."""

    def __init__(self, config: DecoderConfig, input_width: int) -> None:
        super().__init__()
        self.head_dim = config.width_of_head
        self.kv_heads = config.kv_heads
        bias, width = config.qkv_bias, self.head_dim * self.kv_heads
        queries = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(input_width, queries, bias=bias)
        self.k_proj = nn.Linear(input_width, width, bias=bias)
        self.v_proj = nn.Linear(input_width, width, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def project(
        self, inputs: Tensor, rotary: Rotary, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[..., J, D]``, keys and values ``[..., H, D]`` of rows ``[..., X]``."""
        queries, keys = self._queries(inputs), self._keys(inputs)
        rotated = rotary(torch.cat((queries, keys), -2), positions)  # one rotation for both
        return (
            rotated[..., : -self.kv_heads, :],
            rotated[..., -self.kv_heads :, :],
            self._values(inputs),
        )

    def keys_values(
        self, inputs: Tensor, rotary: Rotary, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., H, D]`` alone."""
        return rotary(self._keys(inputs), positions), self._values(inputs)

    def queries(self, inputs: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """Queries ``[..., J, D]`` alone."""
        return rotary(self._queries(inputs), positions)

    def _queries(self, inputs: Tensor) -> Tensor:
        queries = self.q_proj(inputs).unflatten(-1, (-1, self.head_dim))
        return queries if self.q_norm is None else self.q_norm(queries)

    def _keys(self, inputs: Tensor) -> Tensor:
        keys = self.k_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim))
        return keys if self.k_norm is None else self.k_norm(keys)

    def _values(self, inputs: Tensor) -> Tensor:
        return self.v_proj(inputs).unflatten(-1, (self.kv_heads, self.head_dim))


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, config: DecoderConfig, input_width: int | None = None) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, input_width or width)
        self.mlp = SwiGLU(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output ``[..., E]`` from what was attended to, ``[..., J, D]``."""
        hidden = residual + self.self_attn.o_proj(attended.flatten(-2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DecoderStack(nn.ModuleList):
    """Decoder layers one behind the other, as many as the configuration says."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(DecoderLayer(config) for _ in range(config.num_hidden_layers))

    def __iter__(self) -> Iterator[DecoderLayer]:
        return cast("Iterator[DecoderLayer]", super().__iter__())


def initialise(network: nn.Module) -> None:
    """Random matrices of unit gain; vectors stay as they are made."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
