"""The DFlash draft as a module, under the tensor names of z-lab (and of everybody else)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from drafters.layers import DecoderStack, RMSNorm, Rotary
from drafters.vocabulary import OwnHead

if TYPE_CHECKING:
    from drafters.dflash.config import DFlashConfig


class DFlashNetwork(OwnHead):
    """Decoder layers whose keys and values are those of the context features and of the block.

    Letters: E model width, F fused feature width.
    """

    def __init__(self, config: DFlashConfig, feature_width: int, own_mask: bool = False) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.fc = nn.Linear(feature_width, width, bias=False)
        self.hidden_norm = RMSNorm(width, eps)
        self.layers = DecoderStack(config)
        self.norm = RMSNorm(width, eps)
        # What stands at masked places; None borrows the row of the target's embedding.
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if own_mask else None
        self.make_head(width, config.draft_vocab_size, config.vocab_size)
        self.rotary = Rotary(config)

    def block(self, embedded: Tensor) -> Tensor:
        """Rows of blocks ``[..., S, E]``: the anchor as the target embeds it, then the masks."""
        if self.mask_embedding is None:
            return embedded
        masks = self.mask_embedding.expand_as(embedded[..., 1:, :])
        return torch.cat((embedded[..., :1, :], masks), -2)

    def context(self, features: Tensor) -> Tensor:
        """Context features ``[..., E]`` that every layer makes its keys and values of."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
