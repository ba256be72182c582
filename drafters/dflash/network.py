"""The DFlash draft as a module, under the tensor names of z-lab (and of everybody else)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from drafters.layers import DecoderStack, RMSNorm, Rotary

if TYPE_CHECKING:
    from drafters.dflash.config import DFlashConfig


class DFlashNetwork(nn.Module):
    """Decoder layers whose keys and values are those of the context features and of the block.

    Letters: E model width, F fused feature width.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DFlashConfig, feature_width: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.fc = nn.Linear(feature_width, width, bias=False)
        self.hidden_norm = RMSNorm(width, eps)
        self.layers = DecoderStack(config)
        self.norm = RMSNorm(width, eps)
        self.lm_head: nn.Linear | None = None
        if config.draft_vocab_size is not None:
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.rotary = Rotary(config)

    def context(self, features: Tensor) -> Tensor:
        """Context features ``[..., E]`` that every layer makes its keys and values of."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
