"""Updates and scores beside the decoding: in a thread, and on a GPU on a stream of their own.

The engine goes on with the draft that serves; a finished candidate is published at the next round.
One thing is done after the other, in the order in which it was asked for. PyTorch lets go of the
interpreter inside its kernels, so both sides run. On a CPU they share the threads that PyTorch has: half
are the trainer's while it works, and the engine's again when it is done. With more threads than cores
each side would wait for the other at the end of every kernel, many times as long as the kernel takes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from cosched.loop.roles import Scorer, Trainer
    from cosched.records import Decision, SignalBatch, UpdateResult

R = TypeVar("R")
Scores = list[list[float]]


class BackgroundTrainer:
    """Runs another trainer's updates in a thread; everything else waits for the update to end."""

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._trainer = trainer
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # What a thread sets is its own number: that of the others stays.
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="cosched-trainer",
            initializer=torch.set_num_threads,
            initargs=(max(1, self._threads // 2),),
        )
        self._under_way: Future[UpdateResult] | None = None

    def update(self, batch: SignalBatch, decision: Decision) -> None:
        """Begin an update; none may be under way."""
        assert self._under_way is None, "one update at a time"
        self._under_way = self.begin(partial(self._trainer.update, batch, decision))
        self._leave(self._threads // 2)

    def begin(self, work: Callable[[], R | None]) -> Future[R]:
        """Have something done in the thread, behind what the engine has given the device until now."""
        if self._stream is not None:
            engines = torch.cuda.current_stream(self._device)
            while self._stream == engines:  # PyTorch has a few, and hands them out in turns
                self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(engines)
        return self._thread.submit(self._run, work)

    def _leave(self, number: int) -> None:
        """The engine's thread works with all threads but that number."""
        if self._threads > 1:
            torch.set_num_threads(self._threads - number)

    def _run(self, work: Callable[[], R | None]) -> R:
        if self._stream is None:
            done = work()
        else:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                try:
                    done = work()
                finally:  # also of what failed half way: what it still writes may be used again
                    self._stream.synchronize()  # this thread waits for the device, the engine does not
        assert done is not None, "what is behind this one does it at once"
        return done

    def finished(self) -> UpdateResult | None:
        """The update that was begun, once it is done.

        Raises:
            Exception: what the update raised.
        """
        if self._under_way is None or not self._under_way.done():
            return None
        done, self._under_way = self._under_way, None
        self._leave(0)
        return done.result()

    @property
    def busy(self) -> bool:
        """Whether an update is under way, or done and not yet taken."""
        return self._under_way is not None

    def weights(self) -> Mapping[str, Tensor]:
        return self._settled().weights()

    def reset(self) -> None:
        self._settled().reset()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._settled().load(weights)

    def state(self) -> Mapping[str, Tensor]:
        return self._settled().state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._settled().restore(tensors)

    def _settled(self) -> Trainer:
        """The trainer when nothing is under way; what was is let go."""
        if self._under_way is not None:
            self._under_way.result()  # host waits for the thread
            self._under_way = None
            self._leave(0)
        return self._trainer


class BackgroundScorer:
    """Scores in the thread of a trainer, whose copy of the draft they need.

    One look is under way at a time. Who forgets it may write to the weights that it is at, and gets
    no scores of it.
    """

    def __init__(self, scorer: Scorer, behind: BackgroundTrainer) -> None:
        self._scorer = scorer
        self._behind = behind
        self._under_way: Future[Scores] | None = None

    def scores(self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin to score; no scores may be under way."""
        assert self._under_way is None, "one look at a time"
        self._under_way = self._behind.begin(partial(self._scorer.scores, batch, weights))

    @property
    def busy(self) -> bool:
        """Whether a look is under way, or done and not yet taken."""
        return self._under_way is not None

    def finished(self) -> Scores | None:
        """The scores that were begun, once they are there.

        Raises:
            Exception: what scoring raised.
        """
        if self._under_way is None or not self._under_way.done():
            return None
        done, self._under_way = self._under_way, None
        return done.result()

    def forget(self) -> None:
        """Nobody wants to know any more."""
        self._under_way = None
