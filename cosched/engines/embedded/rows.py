"""Where verification rows come from: here a target that runs now; a trace is the other source.

Letters: B requests, S rows, P prompt rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.engines.embedded.target import Target, TargetRows
    from cosched.engines.request import GenerationRequest


class RowSource(Protocol):
    """Answers with the target's rows, slot by slot."""

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        """Rows of a whole prompt ``[1, P]``; logits of its last row only."""
        ...

    def verify(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        counts: Sequence[int] | None = None,
        sees_BSS: Tensor | None = None,
    ) -> TargetRows:
        """Rows of slots ``0..B - 1``: of slot b the first ``counts[b]``, others may be anything.

        With ``sees_BSS`` they are trees (``trees.Forest``), of which ``keep`` tells what became text.
        """
        ...

    def keep(self, slot: int, start: int, rows: Sequence[int]) -> None:
        """Of the slot's rows just verified, the first at ``start``, these are its text from there on."""
        ...

    def move_slot(self, source: int, destination: int, length: int) -> None: ...


@runtime_checkable
class RunsLayers(Protocol):
    """What a source has besides, if there is a target behind it that runs."""

    def layers(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        layers: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """``cosched.protocols.LayersForward``; what it writes is overwritten by ``verify``."""
        ...


EXACT_POSITIONS = 64  # attention sums over whole vectors of them, in the same order for every row


class LiveRows:
    """Runs the target over a slot cache.

    With ``exact_rows`` every verification computes that many rows of each request, and attention
    goes over whole blocks of positions: a row is then computed alike in every arm.
    """

    def __init__(
        self,
        target: Target,
        max_batch: int,
        max_length: int,
        feature_layers: tuple[int, ...],
        exact_rows: int | None = None,
    ) -> None:
        self._target = target
        self._round_to = EXACT_POSITIONS if exact_rows else 1
        self._exact_rows = exact_rows
        length = max_length + (exact_rows or 0)
        self._cache = target.new_cache(max_batch, length + -length % self._round_to)
        self._layers = feature_layers

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        return self.commit(slot, request.prompt_P, 0)

    def commit(self, slot: int, tokens_R: Tensor, start: int) -> TargetRows:
        """Rows ``[1, R]`` of a text that goes on at ``start``; logits of its last row only."""
        positions_1R = torch.arange(start, start + len(tokens_R), device=tokens_R.device)[None]
        return self._target.forward(
            tokens_R[None],
            positions_1R,
            self._cache,
            self._layers,
            first_slot=slot,
            num_logits=1,
        )

    def verify(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        counts: Sequence[int] | None = None,
        sees_BSS: Tensor | None = None,
    ) -> TargetRows:
        if sees_BSS is not None:
            assert self._exact_rows is None, "rows of trees are not computed alike"
            return self._target.forward(
                ids_BS, positions_BS, self._cache, self._layers, counts=counts, sees_BTT=sees_BSS
            )
        num_rows = ids_BS.shape[1]
        if missing := max(0, (self._exact_rows or 0) - num_rows):
            ids_BS = torch.cat((ids_BS, ids_BS[:, -1:].expand(-1, missing)), 1)
            ahead = torch.arange(1, missing + 1, device=positions_BS.device)
            positions_BS = torch.cat((positions_BS, positions_BS[:, -1:] + ahead), 1)
        rows = self._target.forward(
            ids_BS, positions_BS, self._cache, self._layers, round_to=self._round_to, counts=counts
        )
        return rows.first(num_rows) if missing else rows

    def keep(self, slot: int, start: int, rows: Sequence[int]) -> None:
        if list(rows) != list(range(len(rows))):
            self._cache.bring_together(slot, start, rows)

    def layers(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        layers: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        rows = self._target.forward(
            ids_BT, positions_BT, self._cache, counts=counts, layers=tuple(layers)
        )
        return rows.logits_BTV

    def move_slot(self, source: int, destination: int, length: int) -> None:
        self._cache.move(source, destination, length)
