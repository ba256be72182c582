"""The EAGLE-3 head as a module, under the tensor names of SafeAILab and SpecForge."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from drafters.layers import DecoderLayer, RMSNorm, Rotary
from drafters.vocabulary import OwnHead

if TYPE_CHECKING:
    from drafters.eagle3.config import Eagle3Config


class Eagle3Layer(DecoderLayer):
    """The first decoder layer, with a norm for each half of its input; most heads have no other."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config, input_width=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3UpperLayer(DecoderLayer):
    """A further layer, which sees what is below it alone, under the name SGLang gives its norm."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        del self.input_layernorm
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3Network(OwnHead):
    """The head; how rows attend is left to the caller.

    ``layer`` counts its layers from 0, from the target's features to the head.

    Letters: E model width, F fused feature width, J query heads, H key-value heads, D head width.
    """

    def __init__(
        self, config: Eagle3Config, target_hidden_size: int, own_embedding: bool = False
    ) -> None:
        super().__init__()
        width, eps, features = config.hidden_size, config.rms_norm_eps, config.num_features
        self.config = config
        self.fc = nn.Linear(features * target_hidden_size, width, bias=config.bias)
        self.input_norm = (
            RMSNorm(features * target_hidden_size, eps) if config.norm_before_fc else None
        )
        self.fc_norm = (
            nn.ModuleList(RMSNorm(target_hidden_size, eps) for _ in range(features))
            if config.fc_norm
            else None
        )
        self.midlayer = Eagle3Layer(config)
        self.layers = nn.ModuleDict(
            {str(i): Eagle3UpperLayer(config) for i in range(1, config.num_hidden_layers)}
        )
        self.norm = RMSNorm(width, eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if own_embedding else None
        self.make_head(width, config.draft_vocab_size, config.vocab_size)
        self.rotary = Rotary(config)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features ``[..., F]`` to the model's width."""
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, -1)
        return self.fc(features)

    @property
    def top(self) -> int:
        """The layer next to the head."""
        return len(self.layers)

    def inputs(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer's queries, keys and values are made of, and the residual.

        Inputs are ``[..., 2E]``, the residual is ``[..., E]``.
        """
        layer = self.midlayer
        normed = layer.hidden_norm(hidden)
        inputs = torch.cat((layer.input_layernorm(embedded), normed), -1)
        return inputs, normed if self.config.norm_before_residual else hidden

    def inputs_above(self, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The same of a further layer, ``[..., E]`` both, from the output of the one below it."""
        return self._layer(layer).hidden_norm(hidden), hidden

    def project(
        self, inputs: Tensor, positions: Tensor, layer: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[..., J, D]``, keys and values ``[..., H, D]`` of rows of a layer's inputs."""
        return self._layer(layer).self_attn.project(inputs, self.rotary, positions)

    def keys_values(
        self, inputs: Tensor, positions: Tensor, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., H, D]`` of rows of a layer's inputs."""
        return self._layer(layer).self_attn.keys_values(inputs, self.rotary, positions)

    def queries(self, inputs: Tensor, positions: Tensor, layer: int = 0) -> Tensor:
        """Queries ``[..., J, D]`` of rows of a layer's inputs."""
        return self._layer(layer).self_attn.queries(inputs, self.rotary, positions)

    def finish(self, residual: Tensor, attended: Tensor, layer: int = 0) -> Tensor:
        """A layer's output ``[..., E]``."""
        return self._layer(layer).finish(residual, attended)

    def outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, and what the chain feeds on, of the top layer's: both ``[..., E]``."""
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    def _layer(self, layer: int) -> Eagle3Layer | Eagle3UpperLayer:
        return cast("Eagle3UpperLayer", self.layers[str(layer)]) if layer else self.midlayer
