"""Worker processes, each with one experiment at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from queue import Empty, Queue
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec

from cosched.settings.load import to_yaml
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cosched.sweep.plan import Job


class Event(NamedTuple):
    """What a worker says of a job: ``total`` and ``tokens`` count, ``error`` and ``done`` end it."""

    worker: int
    job: Job
    kind: str
    value: Any


class Pool:
    """Up to ``num_workers`` processes of one thread each; their standard errors go to ``logs``."""

    def __init__(self, num_workers: int, logs: Path) -> None:
        self._logs = logs
        self._num_workers = num_workers
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._stopped = False

    def run(self, jobs: Sequence[Job], on_event: Callable[[Event], None]) -> dict[str, str]:
        """Run them all; returns what went wrong by job id. An interruption ends the workers."""
        waiting: Queue[Job] = Queue()
        events: Queue[Event] = Queue()
        for job in jobs:
            waiting.put(job)
        threads = [
            threading.Thread(target=self._serve, args=(number, waiting, events), daemon=True)
            for number in range(min(self._num_workers, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        failures: dict[str, str] = {}
        left = len(jobs)
        try:
            while left:
                event = events.get()
                on_event(event)
                left -= event.kind in {"done", "error"}
                if event.kind == "error":
                    failures[event.job.id] = event.value
        except BaseException:
            self.stop()
            raise
        for thread in threads:
            thread.join()
        return failures

    def stop(self) -> None:
        """End the workers at once: what they were at is half done and will be done again."""
        self._stopped = True
        for process in list(self._processes.values()):
            process.kill()
        self.close()

    def close(self) -> None:
        """Let the workers go when they are done."""
        for process in self._processes.values():
            _let_go(process)
        self._processes.clear()

    def _serve(self, number: int, waiting: Queue[Job], events: Queue[Event]) -> None:
        """A thread's work: one worker process, kept while it lives, and a job after the other."""
        while not self._stopped:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            try:
                self._run_one(number, job, events)
            except (OSError, ValueError) as error:  # no process, or its pipes are closed
                events.put(Event(number, job, "error", f"no worker could run it: {error}"))

    def _run_one(self, number: int, job: Job, events: Queue[Event]) -> None:
        process = self._processes.get(number)
        if process is not None and process.poll() is not None:
            _let_go(process)
            process = None
        if process is None:
            process = self._processes[number] = self._start(number)
        assert process.stdin is not None
        assert process.stdout is not None
        task = {"yaml": to_yaml(job.config), "record": job.record}
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        process.stdin.flush()
        for line in process.stdout:
            ((kind, value),) = msgspec.json.decode(line).items()
            events.put(Event(number, job, kind, value))
            if kind in {"done", "error"}:
                return
        code = process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"with exit code {code}"
        why = f"the worker ended, {how}; see {self._logs / _log_name(number)}"
        events.put(Event(number, job, "error", why))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        with explained(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
            log: IO[bytes] = (self._logs / _log_name(number)).open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "cosched.sweep.worker"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us alone
            )


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Wait for a worker that has nothing more to come; one that was killed has left its pipes."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()
    process.stdout.close()


def _log_name(number: int) -> str:
    return f"worker-{number}.log"
