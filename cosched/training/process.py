"""A process beside the decoding that trains and scores: what a CPU with more cores than one is for.

Two threads of one process take turns in its interpreter, so that decoding waits for training and the
other way round. Two processes do not. What trains and scores is made in the other process, by a
function that is sent there; batches go through a pipe, and weights lie in memory that both have mapped
(an unlinked temporary file: containers often have next to no ``/dev/shm``).

While it works PyTorch's threads are shared: half are the worker's, and the engine's again when it is
done. With more threads than cores each would wait for the other at the end of every kernel, many times
as long as the kernel takes.

The engine never waits for this process to read or to go on: a thread hands over what is sent, and
what is waited for has a limit, after which the process is taken for hung and killed.
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
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosched.errors import TrainingError
from cosched.loop.copies import ALIGNMENT, starts_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.loop.roles import Scorer, Trainer

CANDIDATE, SLOTS = 0, 3  # the candidate lies in the first; others are put there to be scored
PATIENCE_S = 10.0  # for a process that was told to end
LOOKS_S = 1.0  # between two looks at whether the engine is there
LIMIT_S = 600.0  # for an answer, and never less for a start, which reads and builds a lot

Build = Callable[[], "tuple[Trainer, Scorer]"]
"""Makes what trains, and what scores its weights."""

Layout = list[tuple[str, torch.dtype, torch.Size]]
"""Name, type and shape of each tensor of the shared weights, in the order of their bytes."""


class LostError(TrainingError):
    """The process that trains is no more, and with it what it had not yet given."""


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

    It does one thing after another, in the order in which it was asked. ``build`` is pickled. Half of
    ``num_threads`` are the process's (None: of those that PyTorch has here). Nothing may take longer
    than ``limit_s``. The system gives it less of what cores there are the higher its ``niceness`` is.

    Raises:
        LostError: the process has ended by itself, or took too long and was killed; at any call.
        Exception: what ``build`` raised there.
    """

    def __init__(
        self,
        build: Build,
        num_threads: int | None = None,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        niceness: int = 0,
    ) -> None:
        self._threads = num_threads or torch.get_num_threads()
        self._limit_s = max(limit_s, LIMIT_S)
        self._clock = clock
        self._since = clock()  # it has been at the first of what is awaited
        self._awaited: deque[Pending] = deque()
        here, there = Pipe()
        shared = tempfile.TemporaryFile()  # noqa: SIM115  mapped as long as this lives
        handed = (there.fileno(), shared.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, handed)], pass_fds=handed
        )
        there.close()
        self._pipe = here
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        sender = threading.Thread(target=_hand_over, args=(self._outgoing, here), daemon=True)
        sender.start()
        self._end = weakref.finalize(self, _end, self._process, self._outgoing, here, shared)
        self._send((max(1, self._threads // 2), niceness, build))
        well, answer = self._answer()
        if not well:
            self._end()
            raise answer
        # The candidate, and what else is to be scored: what serves, and what was loaded.
        self.slots = _mapped(shared.fileno(), answer)
        self._limit_s = limit_s

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, method: str, *arguments: Any) -> Pending:
        """Have it done; the engine has fewer threads meanwhile."""
        if not self._awaited:
            self._since = self._clock()
        self._send((method, arguments))
        pending = Pending(self)
        self._awaited.append(pending)
        self._leave(self._threads // 2)
        return pending

    def receive(self, waits: bool = False) -> None:
        """Take in what has been answered."""
        while self._awaited and (waits or self._pipe.poll()):
            self._awaited[0].answer = self._answer()
            self._awaited.popleft()
            self._since, waits = self._clock(), False
        if not self._awaited:
            self._leave(0)
        elif self._seconds_left <= 0:
            raise self._hung()

    def close(self) -> None:
        """End the process; nothing can be asked of it any more."""
        self._end()

    def kill(self) -> None:
        """The same of one that may not hear of it."""
        self._process.kill()
        self._end()

    @property
    def _seconds_left(self) -> float:
        return self._since + self._limit_s - self._clock()

    def _leave(self, number: int) -> None:
        """The engine works with all threads but that number."""
        if torch.get_num_threads() != self._threads - number:
            torch.set_num_threads(self._threads - number)

    def _send(self, message: Any) -> None:
        self._outgoing.put(pickle.dumps(message))

    def _answer(self) -> tuple[bool, Any]:
        try:
            if self._pipe.poll(max(0.0, self._seconds_left)):  # host waits for the process
                return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            code = self._lost()
            raise LostError(
                f"the process that trains has ended by itself, with exit code {code}"
            ) from error
        raise self._hung()

    def _hung(self) -> LostError:
        self._process.kill()  # it may be stopped, and hear of nothing else
        self._lost()
        return LostError(
            f"the process that trains gave no answer in {self._limit_s:g} s and was killed"
        )

    def _lost(self) -> int:
        self._awaited.clear()
        self._leave(0)
        return self._process.wait(PATIENCE_S)


def _hand_over(outgoing: SimpleQueue[bytes | None], pipe: Connection) -> None:
    """Write what is sent, in a thread of its own: a process that hangs reads nothing."""
    with suppress(OSError, TypeError):  # it has ended, or the pipe was closed meanwhile
        while (message := outgoing.get()) is not None:
            pipe.send_bytes(message)


def _end(
    process: subprocess.Popen[bytes],
    outgoing: SimpleQueue[bytes | None],
    pipe: Connection,
    shared: Any,
) -> None:
    outgoing.put(None)
    pipe.close()  # which it takes for the end
    shared.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _mapped(descriptor: int, layout: Layout) -> list[dict[str, Tensor]]:
    """``SLOTS`` times tensors of that layout, over the bytes of a file, which is made long enough."""
    starts = starts_of(dtype.itemsize * math.prod(shape) for _, dtype, shape in layout)
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
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
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


def _end_with(engine: int) -> None:
    """An update may take minutes: where the engine was killed, nobody waits for it."""
    while os.getppid() == engine:
        time.sleep(LOOKS_S)
    os._exit(1)


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
            copy_weights(self.trainer.weights(), self.slots[CANDIDATE])
        return answer


def _begin(pipe: Connection, descriptor: int) -> _Learner:
    num_threads, niceness, build = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(num_threads)
    os.nice(niceness)
    trainer, scorer = build()
    first = trainer.weights()
    layout = [(name, weight.dtype, weight.shape) for name, weight in first.items()]
    slots = _mapped(descriptor, layout)
    copy_weights(first, slots[CANDIDATE])
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
def copy_weights(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    """Write what the source has over tensors of the same names."""
    for name, weight in destination.items():
        weight.copy_(source[name])


if __name__ == "__main__":
    main()
