"""A key-value cache whose requests are at different positions, for transformers' models.

Letters: B slots in use, H key-value heads, T new rows, L positions, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cosched.engines.embedded.ragged import Ragged


class SlotCache(Cache):
    """Preallocated keys and values by slot; rolling back is forgetting a length.

    ``place(positions_BT)`` says where the next forward pass writes; the rows that were refused
    stay in the buffer and are overwritten before anything may look at them.
    """

    def __init__(
        self, num_layers: int, max_batch: int, max_length: int, device: torch.device
    ) -> None:
        slots = [_SlotLayer(self, max_batch, max_length) for _ in range(num_layers)]
        super().__init__(layers=list(slots))
        self.slots = slots
        self.device = device
        self.visible = 0
        self.shown = slice(0, 0)
        self.index_BT: Tensor | None = None
        self.slots_BT: Tensor | None = None

    def place(
        self,
        positions_BT: Tensor,
        visible: int,
        first_slot: int = 0,
        ragged: Ragged | None = None,
    ) -> None:
        """The next pass writes row t of request b at ``positions_BT[b, t]`` and sees ``visible``."""
        last_slot = first_slot + len(positions_BT)
        if ragged is None:
            self.index_BT = positions_BT
            self.slots_BT = torch.arange(first_slot, last_slot, device=self.device)[:, None]
        else:
            self.index_BT = ragged.pack(positions_BT)
            self.slots_BT = first_slot + ragged.slots_N[None]
        self.visible = visible
        self.shown = slice(first_slot, last_slot)

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for layer in self.slots:
            for buffer in layer.buffers():
                buffer[destination, :, :length] = buffer[source, :, :length]

    def bring_together(self, slot: int, start: int, rows: Sequence[int]) -> None:
        """Of the rows written from ``start`` on the i-th of these, in rising order, goes to ``start + i``."""
        from_R = start + torch.tensor(rows, device=self.device)
        for layer in self.slots:
            for buffer in layer.buffers():
                own = buffer[slot]
                own[:, start : start + len(rows)] = own[:, from_R]


class _SlotLayer(CacheLayerMixin):
    def __init__(self, cache: SlotCache, max_batch: int, max_length: int) -> None:
        super().__init__()
        self.cache = cache
        self.max_batch = max_batch
        self.max_length = max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, width = key_states.shape[1], key_states.shape[-1]
        shape = (self.max_batch, heads, self.max_length, width)
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros((*shape[:-1], value_states.shape[-1]))
        self.is_initialized = True

    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values of all slots; nothing before the first forward pass."""
        if self.keys is None or self.values is None:
            return ()
        return self.keys, self.values

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,  # noqa: ARG002  the role's signature
        **kwargs: object,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        assert cache.index_BT is not None
        assert cache.slots_BT is not None
        keys, values = self.buffers()
        # By slot and position: only the new rows are touched, however long the cache is.
        keys[cache.slots_BT, :, cache.index_BT] = key_states.transpose(1, 2)
        values[cache.slots_BT, :, cache.index_BT] = value_states.transpose(1, 2)
        return keys[cache.shown, :, : cache.visible], values[cache.shown, :, : cache.visible]

    def get_seq_length(self) -> int:
        return self.cache.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self.cache.visible, 0

    def get_max_cache_shape(self) -> int:
        return self.max_length
