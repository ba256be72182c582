"""A PARD draft as a module, under the tensor names of transformers and of AMD's PARD-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from drafters.layers import DecoderStack, RMSNorm, Rotary
from drafters.vocabulary import logits_of

if TYPE_CHECKING:
    from drafters.pard.config import PardConfig


class PardBody(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: PardConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = DecoderStack(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class PardNetwork(nn.Module):
    """The language model; how rows attend is left to the caller.

    Letters: E model width, F fused feature width, U draft vocabulary.
    """

    def __init__(self, config: PardConfig, feature_width: int) -> None:
        super().__init__()
        self.config = config
        self.model = PardBody(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.target_proj = (
            nn.Linear(feature_width, config.hidden_size, bias=config.pard2_proj_bias)
            if config.uses_features
            else None
        )
        self.rotary = Rotary(config)
        self._tied: list[nn.Linear] = []  # in a list, so that it is no submodule

    @property
    def tied_head(self) -> nn.Linear | None:
        """The embedding as a linear layer, where it is the head as well; a runtime may lay it out."""
        if self.lm_head is not None:
            return None
        weight = self.model.embed_tokens.weight
        if self._tied and self._tied[0].weight is weight:
            return self._tied[0]
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.out_features, layer.in_features = weight.shape
        del layer.weight
        layer.weight = weight
        if isinstance(weight, nn.Parameter):  # else functional_call has put it there for the while
            self._tied = [layer]
        return layer

    def embed(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """``[..., E]``: token embeddings, and for PARD-2 the feature before each token."""
        embedded = self.model.embed_tokens(tokens)
        if self.target_proj is None:
            return embedded
        assert features is not None, "PARD-2 needs the target's features"
        projected = self.target_proj(features.to(self.target_proj.weight.dtype))
        return embedded + projected * self.config.pard2_scale

    def head(self, hidden: Tensor, tokens_W: Tensor | None = None) -> Tensor:
        """Logits ``[..., U]``, or of some tokens ``[..., W]``."""
        hidden = self.model.norm(hidden)
        head = self.lm_head or self.tied_head
        assert head is not None
        return logits_of(head, hidden, tokens_W)
