"""Updates beside the decoding, in a process of their own: what a CPU with more cores than one is for.

Two threads of one process take turns in its interpreter, so that decoding waits for training and the
other way round. Two processes do not. What trains and scores is made in the other process, by a
function that is sent there; batches go through a pipe, and weights lie in memory that both have mapped
(an unlinked temporary file: containers often have next to no ``/dev/shm``).

While it works PyTorch's threads are shared: half are the worker's, and the engine's again when it is
done. With more threads than cores each would wait for the other at the end of every kernel, many times
as long as the kernel takes.
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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from cosched.errors import TrainingError
from cosched.records import UpdateResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.loop.roles import Scorer, Trainer
    from cosched.records import Decision, SignalBatch

ALIGNMENT = 64  # bytes
CANDIDATE, SLOTS = 0, 3  # the candidate lies in the first; others are put there to be scored
PATIENCE_S = 10.0  # for a process that was told to end

R = TypeVar("R")

Build = Callable[[], "tuple[Trainer, Scorer]"]
"""Makes what trains, and what scores its weights."""

Layout = list[tuple[str, torch.dtype, torch.Size]]
"""Name, type and shape of each tensor of the shared weights, in the order of their bytes."""


class Pending:
    """What was asked for and is not there yet, until it is."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.answer: tuple[bool, Any] | None = None

    @property
    def done(self) -> bool:
        self._worker.receive()
        return self.answer is not None

    def result(self) -> Any:
        """Wait for it.

        Raises:
            Exception: what was raised in the process.
        """
        while self.answer is None:
            self._worker.receive(waits=True)
        well, value = self.answer
        if not well:
            raise value
        return value


class Worker:
    """A process that trains, with ``build`` made into what does it; it ends with this object.

    It does one thing after another, in the order in which it was asked. ``build`` is pickled.

    Raises:
        TrainingError: the process has ended by itself; at any call.
        Exception: what ``build`` raised there.
    """

    def __init__(self, build: Build) -> None:
        self._threads = torch.get_num_threads()
        self._awaited: deque[Pending] = deque()
        here, there = Pipe()
        shared = tempfile.TemporaryFile()  # noqa: SIM115  mapped as long as this lives
        handed = (there.fileno(), shared.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, handed)], pass_fds=handed
        )
        there.close()
        self._pipe = here
        self._end = weakref.finalize(self, _end, self._process, here, shared)
        self._send((max(1, self._threads // 2), build))
        well, answer = self._answer()
        if not well:
            self._end()
            raise answer
        # The candidate, and what else is to be scored: what serves, and what was loaded.
        self.slots = _mapped(shared.fileno(), answer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Have it done; the engine has fewer threads meanwhile."""
        self._send((method, arguments))
        pending = Pending(self)
        self._awaited.append(pending)
        self._leave(self._threads // 2)
        return pending

    def receive(self, waits: bool = False) -> None:
        """Take in what has been answered."""
        while self._awaited and (waits or self._pipe.poll()):
            self._awaited.popleft().answer = self._answer()
            waits = False
        if not self._awaited:
            self._leave(0)

    def close(self) -> None:
        """End the process; nothing can be asked of it any more."""
        self._end()

    def _leave(self, number: int) -> None:
        """The engine works with all threads but that number."""
        if torch.get_num_threads() != self._threads - number:
            torch.set_num_threads(self._threads - number)

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send_bytes(pickle.dumps(message))
        except OSError as error:
            raise self._ended() from error

    def _answer(self) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipe.recv_bytes())  # host waits for the process
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def _ended(self) -> TrainingError:
        self._awaited.clear()
        self._leave(0)
        code = self._process.wait(PATIENCE_S)
        return TrainingError(f"the process that trains has ended by itself, with exit code {code}")


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
    """The trainer in a worker. One update is under way at a time; a ``reset`` drops it.

    Everything else waits for what is under way to end.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._resetting: Pending | None = None

    def update(self, batch: SignalBatch, decision: Decision) -> None:
        """Begin an update; none may be under way."""
        self._begin("update", batch, decision)

    @property
    def busy(self) -> bool:
        """Whether an update is under way, or done and not yet taken, or being dropped."""
        if self._resetting is not None and self._resetting.done:
            self._settle()
        return self._under_way is not None or self._resetting is not None

    def weights(self) -> Mapping[str, Tensor]:
        self._settle()
        return self.worker.slots[CANDIDATE]

    def reset(self) -> None:
        """Nobody waits for it: who asks for weights does."""
        self._under_way, self._resetting = None, self.worker.ask("reset")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._call("load", dict(weights))

    def state(self) -> Mapping[str, Tensor]:
        return self._call("state")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._call("restore", dict(tensors))

    def _call(self, method: str, *arguments: Any) -> Any:
        self._settle()
        return self.worker.ask(method, *arguments).result()

    def _settle(self) -> None:
        """Wait for what is under way, and let it go."""
        awaited = self._under_way, self._resetting
        self._under_way = self._resetting = None
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
        _copy(weights, self.worker.slots[number])
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


def _end(process: subprocess.Popen[bytes], pipe: Connection, shared: Any) -> None:
    pipe.close()  # which it takes for the end
    shared.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _mapped(descriptor: int, layout: Layout) -> list[dict[str, Tensor]]:
    """``SLOTS`` times tensors of that layout, over the bytes of a file, which is made long enough."""
    starts = [0]
    for _, dtype, shape in layout:
        end = starts[-1] + dtype.itemsize * math.prod(shape)
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
    size = max(ALIGNMENT, starts[-1])
    os.ftruncate(descriptor, SLOTS * size)
    shared = mmap.mmap(descriptor, SLOTS * size)

    def tensor(at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        count = math.prod(shape)
        return torch.frombuffer(shared, dtype=dtype, count=count, offset=at).view(shape)

    return [
        {
            name: tensor(slot * size + start, dtype, shape)
            for (name, dtype, shape), start in zip(layout, starts, strict=False)
        }
        for slot in range(SLOTS)
    ]


def main() -> None:
    """The other side: make the learner, then do what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then closes it
    pipe, descriptor = Connection(int(sys.argv[1])), int(sys.argv[2])
    try:
        try:
            learner = _begin(pipe, descriptor)
        except Exception as error:  # noqa: BLE001  it is raised on the other side
            pipe.send_bytes(pickle.dumps((False, error)))
            return
        while True:
            _do(pipe, learner)
    except (EOFError, ConnectionError):
        return


@dataclass(frozen=True, slots=True)
class _Learner:
    """What a worker has: a trainer, what scores its weights, and the weights that both sides see."""

    trainer: Trainer
    scorer: Scorer
    slots: Sequence[Mapping[str, Tensor]]

    def answer(self, method: str, arguments: Sequence[Any]) -> Any:
        if method == "scores":
            batch, asked = arguments
            return self.scorer.scores(batch, [self.slots[number] for number in asked])
        answer = getattr(self.trainer, method)(*arguments)
        if method != "state":
            _copy(self.trainer.weights(), self.slots[CANDIDATE])
        return answer


def _begin(pipe: Connection, descriptor: int) -> _Learner:
    num_threads, build = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(num_threads)
    trainer, scorer = build()
    first = trainer.weights()
    layout = [(name, weight.dtype, weight.shape) for name, weight in first.items()]
    slots = _mapped(descriptor, layout)
    _copy(first, slots[CANDIDATE])
    pipe.send_bytes(pickle.dumps((True, layout)))
    return _Learner(trainer, scorer, slots)


def _do(pipe: Connection, learner: _Learner) -> None:
    method, arguments = pickle.loads(pipe.recv_bytes())
    try:
        answer = True, learner.answer(method, arguments)
    except Exception as error:  # noqa: BLE001  it is raised on the other side
        answer = False, error
    pipe.send_bytes(pickle.dumps(answer))


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    for name, weight in destination.items():
        weight.copy_(source[name])


if __name__ == "__main__":
    main()
