"""Many small copies as one, and where tensors lie behind one another in one piece of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

ALIGNMENT = 64  # bytes


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Where so many bytes each begin behind one another, each on a boundary, and the end of the last."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


class Copies:
    """Copies that are to be made, all together: on a GPU one kernel or a few for each type of number.

    None may write where another reads.
    """

    def __init__(self) -> None:
        self._waiting: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, destination: Tensor, source: Tensor) -> None:
        """Both of one shape."""
        destinations, sources = self._waiting.setdefault(destination.dtype, ([], []))
        destinations.append(destination)
        sources.append(source)

    @torch.no_grad()
    def make(self) -> None:
        """Make those that wait."""
        for destinations, sources in self._waiting.values():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                destinations, sources
            )
        self._waiting.clear()
