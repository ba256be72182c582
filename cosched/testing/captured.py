"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cosched.training.captured import Do


def by_doing(do: Do) -> tuple[Callable[[], None], list[Tensor]]:
    """Records by doing it again: from the same places, into those of the first results."""
    results = do()

    def again() -> None:
        for place, result in zip(results, do(), strict=True):
            place.copy_(result)

    return again, results
