"""Updates beside the decoding, in a process of their own: what a CPU with more cores than one is for.

Two threads of one process take turns in its interpreter, so that decoding waits for training and the
other way round. Two processes do not. The trainer is made in the other process, by a function that
is sent there; batches go through a pipe, and the trained weights lie in memory that both have mapped
(an unlinked temporary file: containers often have next to no ``/dev/shm``).

While an update is under way PyTorch's threads are shared: half are the trainer's, and the engine's
again when it is done. With more threads than cores each would wait for the other at the end of every
kernel, many times as long as the kernel takes.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosched.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cosched.loop.roles import Trainer
    from cosched.records import Decision, SignalBatch, UpdateResult

ALIGNMENT = 64  # bytes
PATIENCE_S = 10.0  # for a process that was told to end

Layout = list[tuple[str, torch.dtype, torch.Size]]
"""Name, type and shape of each tensor of the shared weights, in the order of their bytes."""


class ProcessTrainer:
    """The trainer that ``build`` makes, in a process that is started here and ends with this object.

    One update is under way at a time; everything else waits for its end. ``build`` is pickled.

    Raises:
        TrainingError: the process ended, at any call. What an update raised there, ``finished`` raises.
    """

    def __init__(self, build: Callable[[], Trainer]) -> None:
        self._threads = torch.get_num_threads()
        self._under_way = False
        here, there = Pipe()
        shared = tempfile.TemporaryFile()  # noqa: SIM115  mapped as long as this lives
        handed = (there.fileno(), shared.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, handed)], pass_fds=handed
        )
        there.close()
        self._pipe = here
        self._end = weakref.finalize(self, _end, self._process, here, shared)
        self._send(max(1, self._threads // 2), build)
        self._weights = _mapped(shared.fileno(), self._answer())

    def update(self, batch: SignalBatch, decision: Decision) -> None:
        """Begin an update; none may be under way."""
        assert not self._under_way, "one update at a time"
        self._send("update", (batch, decision))
        self._under_way = True
        self._leave(self._threads // 2)

    def finished(self) -> UpdateResult | None:
        """The update that was begun, once it is done."""
        if not self._under_way or not self._pipe.poll():
            return None
        return self._taken()

    @property
    def busy(self) -> bool:
        """Whether an update is under way, or done and not yet taken."""
        return self._under_way

    def weights(self) -> Mapping[str, Tensor]:
        self._settle()
        return self._weights

    def reset(self) -> None:
        self._call("reset")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._call("load", dict(weights))

    def state(self) -> Mapping[str, Tensor]:
        return self._call("state")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._call("restore", dict(tensors))

    def close(self) -> None:
        """End the process; nothing can be asked of it any more."""
        self._end()

    def _call(self, method: str, *arguments: Any) -> Any:
        self._settle()
        self._send(method, arguments)
        return self._answer()

    def _settle(self) -> None:
        """Wait for what is under way, and let it go."""
        if self._under_way:
            self._taken()

    def _taken(self) -> UpdateResult:
        self._under_way = False
        self._leave(0)
        return self._answer()

    def _leave(self, number: int) -> None:
        """The engine works with all threads but that number."""
        if self._threads > 1:
            torch.set_num_threads(self._threads - number)

    def _send(self, *message: Any) -> None:
        try:
            self._pipe.send_bytes(pickle.dumps(message))
        except OSError as error:
            raise self._ended() from error

    def _answer(self) -> Any:
        try:
            well, answer = pickle.loads(self._pipe.recv_bytes())  # host waits for the process
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if not well:
            raise answer
        return answer

    def _ended(self) -> TrainingError:
        code = self._process.wait(PATIENCE_S)
        return TrainingError(f"the process that trains has ended by itself, with exit code {code}")


def _end(process: subprocess.Popen[bytes], pipe: Connection, shared: Any) -> None:
    pipe.close()  # which it takes for the end
    shared.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _mapped(descriptor: int, layout: Layout) -> dict[str, Tensor]:
    """Tensors of that layout over the bytes of a file, which is made as long as they need."""
    starts = [0]
    for _, dtype, shape in layout:
        end = starts[-1] + dtype.itemsize * math.prod(shape)
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
    os.ftruncate(descriptor, max(1, starts[-1]))
    shared = mmap.mmap(descriptor, max(1, starts[-1]))
    return {
        name: torch.frombuffer(shared, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
        for (name, dtype, shape), start in zip(layout, starts, strict=False)
    }


def main() -> None:
    """The other side: make the trainer, then do what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then closes it
    pipe, descriptor = Connection(int(sys.argv[1])), int(sys.argv[2])
    try:
        trainer, weights = _begin(pipe, descriptor)
        while True:
            _serve(pipe, trainer, weights)
    except (EOFError, BrokenPipeError):
        return


def _begin(pipe: Connection, descriptor: int) -> tuple[Trainer, dict[str, Tensor]]:
    num_threads, build = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(num_threads)
    trainer: Trainer = build()
    first = trainer.weights()
    layout = [(name, weight.dtype, weight.shape) for name, weight in first.items()]
    weights = _mapped(descriptor, layout)
    _copy(first, weights)
    pipe.send_bytes(pickle.dumps((True, layout)))
    return trainer, weights


def _serve(pipe: Connection, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    method, arguments = pickle.loads(pipe.recv_bytes())
    try:
        answer = True, getattr(trainer, method)(*arguments)
        if method != "state":
            _copy(trainer.weights(), weights)
    except Exception as error:  # noqa: BLE001  it is raised on the other side
        answer = False, error
    pipe.send_bytes(pickle.dumps(answer))


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    for name, weight in destination.items():
        weight.copy_(source[name])


if __name__ == "__main__":
    main()
