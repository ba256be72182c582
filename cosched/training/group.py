"""Ranks that train one draft together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """A data-parallel group for ZeRO, in the terms in which DeepSpeed asks (its ``mpu``).

    ``whole`` is the process group of all that train, ``alone`` one of this rank only: the draft
    itself is whole on each of them. ``meet`` waits for all of them, elsewhere than in these groups.

    Raises:
        PartedError: by ``meet``, where one of them has failed.
    """

    rank: int
    size: int
    whole: Any
    alone: Any
    meet: Callable[[], object]

    def get_data_parallel_group(self) -> Any:
        return self.whole

    def get_data_parallel_world_size(self) -> int:
        return self.size

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_model_parallel_group(self) -> Any:
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
