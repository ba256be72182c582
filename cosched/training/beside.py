"""A trainer and a scorer that are in a process of their own, as the engine's side has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cosched.records import UpdateResult
from cosched.training.process import CANDIDATE, SLOTS, copy_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from cosched.records import Decision, SignalBatch
    from cosched.training.process import Pending, Worker

R = TypeVar("R")


class _OneAtATime(Generic[R]):
    """Whoever has a worker do one thing at a time."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._under_way: Pending | None = None

    def _begin(self, method: str, *arguments: Any) -> None:
        assert self._under_way is None, f"one {method} at a time"
        self._under_way = self.worker.ask(method, *arguments)

    def finished(self) -> R | None:
        """What was begun, once it is done; what it raised is raised here."""
        if self._under_way is None or not self._under_way.done:
            return None
        done, self._under_way = self._under_way, None
        return done.result()


class ProcessTrainer(_OneAtATime[UpdateResult]):
    """The trainer in a worker. One update is under way at a time; a ``reset`` or ``load`` drops it.

    Everything else waits for what is under way to end.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._replacing: Pending | None = None

    def update(self, batch: SignalBatch, decision: Decision) -> None:
        """Begin an update; none may be under way."""
        self._begin("update", batch, decision)

    @property
    def busy(self) -> bool:
        """Whether an update is under way, or done and not yet taken, or being dropped."""
        if self._replacing is not None and self._replacing.done:
            self._settle()
        return self._under_way is not None or self._replacing is not None

    def weights(self) -> Mapping[str, Tensor]:
        self._settle()
        return self.worker.slots[CANDIDATE]

    def reset(self) -> None:
        """Nobody waits for it: who asks for weights does."""
        self._under_way, self._replacing = None, self.worker.ask("reset")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """As ``reset``."""
        self._under_way, self._replacing = None, self.worker.ask("load", dict(weights))

    def state(self) -> Mapping[str, Tensor]:
        return self._call("state")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._call("restore", dict(tensors))

    def _call(self, method: str, *arguments: Any) -> Any:
        self._settle()
        return self.worker.ask(method, *arguments).result()

    def _settle(self) -> None:
        """Wait for what is under way, and let it go."""
        awaited = self._under_way, self._replacing
        self._under_way = self._replacing = None
        for pending in awaited:
            if pending is not None:
                pending.result()


@dataclass(frozen=True, slots=True)
class _Copy:
    """Of which weights a slot holds a copy, and how often those had been written in place by then."""

    of: Mapping[str, Tensor]
    times_written: int

    def is_still(self, weights: Mapping[str, Tensor]) -> bool:
        return weights is self.of and _times_written(weights) == self.times_written


class ProcessScorer(_OneAtATime[list[list[float]]]):
    """The scorer in a worker: one look is under way at a time.

    Weights that are there already, and were not written to since, are not sent again.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._copies: dict[int, _Copy] = {}  # by slot

    def scores(self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin to score; no scores may be under way."""
        slots = self.worker.slots
        needed = [n for n, copy in self._copies.items() if any(map(copy.is_still, weights))]
        free = [n for n in range(SLOTS) if n != CANDIDATE and n not in needed]
        asked = [
            CANDIDATE if one is slots[CANDIDATE] else self._slot_of(one, free) for one in weights
        ]
        self._begin("scores", batch, asked)

    def _slot_of(self, weights: Mapping[str, Tensor], free: list[int]) -> int:
        """Where they are, or are put now."""
        for number, copy in self._copies.items():
            if copy.is_still(weights):
                return number
        number = free.pop()
        copy_weights(weights, self.worker.slots[number])
        self._copies[number] = _Copy(weights, _times_written(weights))
        return number

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    def forget(self) -> None:
        """Nobody wants to know any more."""
        self._under_way = None


def _times_written(weights: Mapping[str, Tensor]) -> int:
    return sum(weight._version for weight in weights.values())
