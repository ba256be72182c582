"""Where verification rows come from: here a target that runs now; a trace is the other source.

Letters: B requests, S rows, P prompt rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cosched.engines.embedded.request import GenerationRequest
    from cosched.engines.embedded.target import Target, TargetRows


class RowSource(Protocol):
    """Answers with the target's rows, slot by slot."""

    vocab_size: int

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        """Rows of a whole prompt ``[1, P]``; logits of its last row only."""
        ...

    def verify(self, ids_BS: Tensor, positions_BS: Tensor) -> TargetRows:
        """Rows of slots ``0..B - 1``."""
        ...

    def move_slot(self, source: int, destination: int, length: int) -> None: ...


class LiveRows:
    """Runs the target over a slot cache."""

    def __init__(
        self, target: Target, max_batch: int, max_length: int, feature_layers: tuple[int, ...]
    ) -> None:
        self.vocab_size = target.vocab_size
        self._target = target
        self._cache = target.new_cache(max_batch, max_length)
        self._layers = feature_layers

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        ids_1P = request.prompt_P[None]
        positions_1P = torch.arange(ids_1P.shape[1], device=ids_1P.device)[None]
        return self._target.forward(
            ids_1P, positions_1P, self._cache, self._layers, first_slot=slot, num_logits=1
        )

    def verify(self, ids_BS: Tensor, positions_BS: Tensor) -> TargetRows:
        return self._target.forward(ids_BS, positions_BS, self._cache, self._layers)

    def move_slot(self, source: int, destination: int, length: int) -> None:
        self._cache.move(source, destination, length)
