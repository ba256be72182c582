"""The serving state of a draft: keys and values by slot, and rows not yet run through the draft.

Letters: Y layers, B slots, L cache length, R rows, F fused feature width, H key-value heads,
D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from drafters.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Pending:
    """Committed rows of several slots end to end; those of slot i end before ``ends[i]``."""

    tokens: Tensor
    features: Tensor | None
    positions: Tensor
    counts: list[int]
    ends: list[int]


@dataclass(slots=True)
class SlotCache:
    """Keys and values of every layer; slot b holds positions ``0 .. lengths[b] - 1``."""

    keys_YBHLD: Tensor
    values_YBHLD: Tensor
    window: int | None
    lengths: list[int]
    rows: list[list[tuple[Tensor, Tensor | None]]] = field(default_factory=list)
    adapters: list[int] = field(default_factory=list)  # of the request in each slot

    @classmethod
    def make(
        cls, config: DecoderConfig, like: Tensor, max_batch: int, length: int, window: int | None
    ) -> SlotCache:
        """An empty cache in the type and on the device of ``like``."""
        shape = (
            config.num_hidden_layers,
            max_batch,
            config.kv_heads,
            length,
            config.width_of_head,
        )
        return cls(
            like.new_zeros(shape),
            like.new_zeros(shape),
            window,
            [0] * max_batch,
            [[] for _ in range(max_batch)],
            [0] * max_batch,
        )

    def add(self, slot: int, tokens_R: Tensor, features_RF: Tensor | None) -> None:
        """Rows that were committed and that the draft has not seen."""
        self.rows[slot].append((tokens_R, features_RF))

    def take(self, num_slots: int) -> Pending:
        """All waiting rows of the first slots, which follow on what the cache holds."""
        rows = self.rows[:num_slots]
        if num_slots == 1 and len(rows[0]) == 1:  # one request, one round: nothing to put together
            (tokens, features), start = rows[0][0], self.lengths[0]
            self.rows[0] = []
            count = len(tokens)
            positions = torch.arange(start, start + count, device=tokens.device)
            return Pending(tokens, features, positions, [count], [count])
        counts = [sum(len(tokens) for tokens, _ in slot) for slot in rows]
        features = [part for slot in rows for _, part in slot if part is not None]
        tokens = torch.cat([part for slot in rows for part, _ in slot])
        positions = torch.cat(
            [
                torch.arange(start, start + count, device=tokens.device)
                for start, count in zip(self.lengths, counts, strict=False)
            ]
        )
        self.rows[:num_slots] = [[] for _ in range(num_slots)]
        return Pending(
            tokens,
            torch.cat(features) if features else None,
            positions,
            counts,
            list(accumulate(counts)),
        )

    def append(self, layer: int, pending: Pending, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values ``[sum of R, H, D]`` of waiting rows behind what is there."""
        for slot, (end, count) in enumerate(zip(pending.ends, pending.counts, strict=True)):
            start = self.lengths[slot]
            for cache, new in ((self.keys_YBHLD, keys), (self.values_YBHLD, values)):
                cache[layer, slot, :, start : start + count] = new[end - count : end].transpose(
                    0, 1
                )

    def put(
        self,
        layer: int,
        starts: list[int],
        keys_BTHD: Tensor,
        values_BTHD: Tensor,
        first_slot: int = 0,
    ) -> None:
        """Write T rows of consecutive slots from ``starts`` on, without making them the slots' own."""
        num_slots, num_rows = keys_BTHD.shape[:2]
        caches = (self.keys_YBHLD[layer], keys_BTHD), (self.values_YBHLD[layer], values_BTHD)
        if min(starts) == max(starts):
            for cache, new in caches:
                place = slice(starts[0], starts[0] + num_rows)
                cache[first_slot : first_slot + num_slots, :, place] = new.transpose(1, 2)
            return
        slots_B1 = first_slot + torch.arange(num_slots, device=keys_BTHD.device)[:, None]
        ahead_T = torch.arange(num_rows, device=keys_BTHD.device)
        place_BT = torch.tensor(starts, device=keys_BTHD.device)[:, None] + ahead_T
        for cache, new in caches:
            cache[slots_B1, :, place_BT] = new

    def grow(self, counts: list[int]) -> None:
        """Rows were written in every layer: they belong to the slots now."""
        for slot, count in enumerate(counts):
            self.lengths[slot] += count

    def move(self, source: int, destination: int) -> None:
        """The request in slot ``source`` goes on in slot ``destination``; ``source`` is empty."""
        if source != destination:
            length = self.lengths[source]
            for cache in (self.keys_YBHLD, self.values_YBHLD):
                cache[:, destination, :, :length] = cache[:, source, :, :length]
            self.lengths[destination] = length
            self.rows[destination] = self.rows[source]
            self.adapters[destination] = self.adapters[source]
        self.lengths[source] = 0
        self.rows[source] = []
