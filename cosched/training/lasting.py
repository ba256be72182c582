"""Training that outlives its process: where it was killed or hangs, decoding goes on and another starts.

What trained is lost with it: the update that was under way, whose rows are not trained on again, and a
candidate that was not published. The next process begins with the weights that serve and an empty
optimizer. It is started in a thread, since that takes seconds; meanwhile the trainer is busy, so that
nothing is given to it and nothing is judged.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

from cosched.errors import TrainingError
from cosched.training.process import LostError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from torch import Tensor

    from cosched.records import Decision, SignalBatch, UpdateResult
    from cosched.training.beside import ProcessScorer, ProcessTrainer

    Learner = tuple[ProcessTrainer, ProcessScorer]

logger = logging.getLogger("cosched")


class LastingLearner:
    """A trainer and a scorer in a process that ``start`` makes, once now and again when it is lost.

    ``serving`` gives the weights that serve; None where those are as loaded. After ``restarts`` losses
    without a finished update between them the next is an error.

    Raises:
        Exception: what ``start`` raises the first time.
    """

    def __init__(
        self,
        start: Callable[[], Learner],
        serving: Callable[[], Mapping[str, Tensor] | None],
        restarts: int,
    ) -> None:
        self.trainer, self.scorer = start()
        self.trouble: str | None = None  # why nothing is trained just now
        self._start = start
        self._serving = serving
        self._restarts = restarts
        self._lost = 0  # since the last update
        self._starting: Future[Learner] | None = None
        self.given_up = False

    @property
    def under_way(self) -> bool:
        """Whether another process is being started; one that is there takes over now.

        Raises:
            TrainingError: it cannot be started, and that was the last time.
        """
        if self._starting is None or not self._starting.done():
            return self._starting is not None
        done, self._starting = self._starting, None
        try:
            self.trainer, self.scorer = done.result()
        except Exception as error:  # noqa: BLE001  whatever it is: tried again, or raised
            self._again(f"the process that trains cannot be started: {error}")
            return True
        logger.info("cosched trains again, from the weights that serve")
        self.trouble = None
        weights = self._serving()
        if weights is not None:
            self.trainer.load(weights)
        return False

    @property
    def there(self) -> bool:
        """Whether there is a process to ask."""
        return not self.given_up and not self.under_way

    @contextmanager
    def watched(self) -> Generator[None]:
        """What is asked in here may find the process gone: then another is started.

        Raises:
            TrainingError: that has been done often enough.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_lost(error):
                raise
            self.trainer.worker.kill()
            self._again(str(error) or "the process that trains has no memory left")

    def trained(self) -> None:
        """An update is done: what was lost before is made good."""
        self._lost = 0

    def _again(self, why: str) -> None:
        self._lost += 1
        if self._lost > self._restarts:
            self.given_up, self.trouble = True, None
            raise TrainingError(f"{why}; lost {self._lost} times since an update was done")
        self.trouble = f"{why}; it is started again ({self._lost} of {self._restarts})"
        self._starting = Future()
        Thread(target=_start_into, args=(self._starting, self._start), daemon=True).start()


def _is_lost(error: Exception) -> bool:
    """Whether a process is gone, or of no use: PyTorch says in words what memory it did not get."""
    return isinstance(error, LostError | MemoryError) or "memory" in str(error)


def _start_into(future: Future[Learner], start: Callable[[], Learner]) -> None:
    try:
        future.set_result(start())
    except BaseException as error:  # noqa: BLE001  raised where it is waited for
        future.set_exception(error)


class LastingTrainer:
    """The trainer of it. What cannot be asked for is done when the next process has begun."""

    def __init__(self, learner: LastingLearner) -> None:
        self.learner = learner

    @property
    def busy(self) -> bool:
        """Whether an update is under way, or done and not yet taken, or a process is being started."""
        busy, learner = not self.learner.given_up, self.learner
        if learner.there:
            with learner.watched():
                busy = learner.trainer.busy
        return busy

    def update(self, batch: SignalBatch, decision: Decision) -> None:
        """Begin an update; none may be under way."""
        with self.learner.watched():
            self.learner.trainer.update(batch, decision)

    def finished(self) -> UpdateResult | None:
        result = None
        if self.learner.there:
            with self.learner.watched():
                result = self.learner.trainer.finished()
        if result is not None:
            self.learner.trained()
        return result

    def weights(self) -> Mapping[str, Tensor]:
        return self.learner.trainer.weights()

    def reset(self) -> None:
        if self.learner.there:
            with self.learner.watched():
                self.learner.trainer.reset()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        if self.learner.there:
            with self.learner.watched():
                self.learner.trainer.load(weights)

    def state(self) -> Mapping[str, Tensor]:
        """Raises ``LostError`` where there is none just now."""
        if self.learner.there:
            with self.learner.watched():
                return self.learner.trainer.state()
        raise LostError(self.learner.trouble or "the process that trains is lost")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.learner.trainer.restore(tensors)


class LastingScorer:
    """The scorer of it. A look that was lost is let go."""

    def __init__(self, learner: LastingLearner) -> None:
        self.learner = learner

    def scores(self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin to score; no scores may be under way."""
        with self.learner.watched():
            self.learner.scorer.scores(batch, weights)

    @property
    def busy(self) -> bool:
        """Whether a look is under way, or done and not yet taken."""
        return self.learner.there and self.learner.scorer.busy

    def finished(self) -> list[list[float]] | None:
        """Scores that were begun, once they are there."""
        if self.learner.there:
            with self.learner.watched():
                return self.learner.scorer.finished()
        return None

    def forget(self) -> None:
        self.learner.scorer.forget()
