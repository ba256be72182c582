"""Requests with unequal numbers of rows in one forward pass: end to end, without padding.

Letters: B requests, T places for rows of each, N rows of all of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor


class Ragged:
    """Which places of ``[B, T]`` are rows: the first ``counts[b]`` of request b.

    All of a model but attention looks at rows one by one, and sees ``[1, N]``. Attention has to hold
    each request's rows against its own cache: there alone they are spread out, and packed again.
    """

    def __init__(self, counts: Sequence[int], width: int, device: torch.device) -> None:
        self._num_slots, self._width = len(counts), width
        places = [slot * self._width + row for slot, n in enumerate(counts) for row in range(n)]
        self._places_N = torch.tensor(places, device=device)
        self.slots_N = self._places_N // self._width

    def pack(self, rows_BTX: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[1, N, …]``."""
        return rows_BTX.flatten(0, 1)[self._places_N][None]

    def spread(self, rows_1NX: Tensor) -> Tensor:
        """``[1, N, …]`` to ``[B, T, …]``, zeros where there is no row."""
        shape = (self._num_slots, self._width, *rows_1NX.shape[2:])
        spread = rows_1NX.new_zeros(shape)
        spread.flatten(0, 1)[self._places_N] = rows_1NX[0]
        return spread


RAGGED: ContextVar[Ragged | None] = ContextVar("ragged", default=None)
"""How the rows of the forward pass that is going on are packed; a model passes attention no such thing."""


@contextmanager
def packed_as(ragged: Ragged | None) -> Generator[None]:
    """Tell attention."""
    token = RAGGED.set(ragged)
    try:
        yield
    finally:
        RAGGED.reset(token)
