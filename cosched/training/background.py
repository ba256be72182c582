"""Updates beside the decoding: in a thread, and on a GPU on a stream of their own.

The engine goes on with the draft that serves; a finished candidate is published at the next round.
One update is under way at a time. PyTorch lets go of the interpreter inside its kernels, so both
sides run. On a CPU they share the threads that PyTorch has: half are the trainer's while it works, and
the engine's again when it is done. With more threads than cores each side would wait for the other at
the end of every kernel, many times as long as the kernel takes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from cosched.loop.roles import Trainer
    from cosched.records import Decision, SignalBatch, UpdateResult


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
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._under_way = self._thread.submit(self._run, batch, decision)
        self._leave(self._threads // 2)

    def _leave(self, number: int) -> None:
        """The engine's thread works with all threads but that number."""
        if self._threads > 1:
            torch.set_num_threads(self._threads - number)

    def _run(self, batch: SignalBatch, decision: Decision) -> UpdateResult:
        if self._stream is None:
            result = self._trainer.update(batch, decision)
        else:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                result = self._trainer.update(batch, decision)
                self._stream.synchronize()  # this thread waits for the device, the engine does not
        assert result is not None, "a trainer behind this one updates at once"
        return result

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
