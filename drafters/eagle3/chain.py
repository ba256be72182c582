"""Who sees whom in a head of several layers: waiting rows while serving, chains while learning.

Letters: R rows, C context rows, N anchors, H key-value heads, J query heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drafters.attention import attend_cache, attend_packed, causal

if TYPE_CHECKING:
    from drafters.cache import Pending, SlotCache


@dataclass(slots=True)
class Chain:
    """Keys and values of one layer: of the context, and of the rows that anchors drafted behind it."""

    keys_RCHD: Tensor
    values_RCHD: Tensor
    own_keys: list[Tensor] = field(default_factory=list[Tensor])
    own_values: list[Tensor] = field(default_factory=list[Tensor])

    def extend(self, keys_RNHD: Tensor, values_RNHD: Tensor) -> None:
        """One more drafted row of each anchor."""
        self.own_keys.append(keys_RNHD)
        self.own_values.append(values_RNHD)

    def attend(self, queries_RNJD: Tensor, visible_RNC: Tensor, own_1S: Tensor | None) -> Tensor:
        """Attention of each anchor's newest row, ``[R, N, J, D]``."""
        return attend_packed(
            queries_RNJD[:, :, None],
            self.keys_RCHD,
            self.values_RCHD,
            visible_RNC[:, :, None],
            torch.stack(self.own_keys, 2) if self.own_keys else None,
            torch.stack(self.own_values, 2) if self.own_values else None,
            own_1S,
        ).squeeze(2)


def attend_pending(state: SlotCache, layer: int, pending: Pending, queries: Tensor) -> Tensor:
    """Attention of waiting rows ``[sum of R, J, D]`` over their slots' caches, where their keys are."""
    attended: list[Tensor] = []
    for slot, (end, count) in enumerate(zip(pending.ends, pending.counts, strict=True)):
        length = state.lengths[slot] + count
        positions_R = pending.positions[end - count : end]
        visible = causal(positions_R, torch.arange(length, device=queries.device), state.window)
        attended.append(
            attend_cache(
                queries[None, end - count : end],
                state.keys_YBHLD[layer, slot : slot + 1, :, :length],
                state.values_YBHLD[layer, slot : slot + 1, :, :length],
                visible[None],
            )[0]
        )
    return torch.cat(attended)
