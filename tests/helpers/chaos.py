"""A run that is killed at random moments and goes on each time, and what came of it.

``cosched run`` with a trainer in a process of its own: SIGKILL of the run, SIGKILL or SIGSTOP of the trainer,
or both at once, at moments of a seeded generator, also while it starts. Behind each the folder is looked at
as a later start finds it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from cosched.runs.resume import load, states_of
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.leftovers import command, left, listed, mapped_by, mark, marked
from tests.helpers.paths import ROOT

PATIENCE_S = 120.0  # for what must come
TRAINER = b"cosched.training.process"
VICTIMS = ("run", "run", "both", "trainer", "trainer", "hang")


@dataclass
class Figures:
    """What was done, and what came of it: all but the first few must be nothing at all."""

    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    finished: int = 0
    groups_lost: list[int] = field(
        default_factory=list
    )  # of those that were done when it was killed
    seconds_to_go_on: list[float] = field(
        default_factory=list
    )  # from a start to its first new state
    states_back: int = (
        0  # how often a start would have gone on from an older state than was reported
    )
    damaged: int = 0  # states that are there and not whole
    left: list[str] = field(default_factory=list)  # processes, sockets, files in temporary folders
    failures: list[str] = field(
        default_factory=list
    )  # starts that ended by themselves, and not well
    other_texts: int = 0  # of finished runs, against one that nobody has killed

    @property
    def moments(self) -> int:
        return sum(self.killed.values())

    def table(self) -> Table:
        """For people."""
        lost, seconds = self.groups_lost or [0], self.seconds_to_go_on or [0.0]
        table = Table("what", "how often", title="killed and gone on from")
        for row in (
            ("moments", f"{self.moments} ({', '.join(f'{n} {k}' for k, n in self.killed.items())})"),
            ("starts, runs that came to their end", f"{self.starts}, {self.finished}"),
            ("groups decoded again, most at once", f"{sum(lost)}, {max(lost)}"),
            ("seconds to the first new state, median, most",
             f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"),
            ("went on from an older state than the newest", f"{self.states_back}"),
            ("states that were not whole", f"{self.damaged}"),
            ("processes, sockets, files left", f"{len(self.left)}"),
            ("starts that failed", f"{len(self.failures)}"),
            ("runs whose texts differ", f"{self.other_texts}"),
        ):  # fmt: skip
            table.add_row(*row)
        return table


class Chaos:
    """Kills a run of one file ``moments`` times, at least; ``texts`` are what it must say."""

    def __init__(self, config: Path, folder: Path, texts: dict[str, str], seed: int) -> None:
        self.figures = Figures()
        self._config = config
        self._folder = RunFolder(folder)
        self._texts = texts
        self._rng = random.Random(seed)
        self._temporary = folder.parent / "tmp"
        self._temporary.mkdir()
        self._shared: set[Path] = set()  # memory that a run has mapped, by its names
        self._newest = 0  # state that was seen
        self._resume = False
        self._may_hang = False  # a process that starts may take ten minutes, and is waited for

    def run(self, moments: int) -> Figures:
        """Until so many moments have passed and one more run has come to its end."""
        while not self.figures.failures and (
            self.figures.moments < moments or not self.figures.finished or self._resume
        ):
            self._one_start(kill=self.figures.moments < moments)
            self._look_at_folder()
        return self.figures

    def _one_start(self, kill: bool) -> None:
        """One process, until it is killed or has come to its end."""
        self.figures.starts += 1
        process = self._start()
        try:
            self._watch(process, kill)
        finally:
            process.kill()
        assert process.stderr is not None
        with process.stderr:
            said = process.stderr.read()
        code = process.wait(PATIENCE_S)
        self._look_for_leftovers()
        if code == 0:
            self._ended_well()
        elif code != -signal.SIGKILL:
            self.figures.failures.append(said[-2000:])

    def _watch(self, process: subprocess.Popen[str], kill: bool) -> None:
        """Until it is killed or has come to its end."""
        started, seen = time.monotonic(), self._newest
        self._begin_at(process, time.time_ns())
        while process.poll() is None:
            until = time.monotonic() + self._rng.uniform(0.0, 4.0 if kill else 0.2)
            while time.monotonic() < until and process.poll() is None:
                self._look_at_newest()
                if self._newest > seen:
                    self.figures.seconds_to_go_on.append(time.monotonic() - started)
                    seen = 1 << 30
                time.sleep(0.002)
            if kill and process.poll() is None and self._strike(process):
                break

    def _begin_at(self, process: subprocess.Popen[str], began: int) -> None:
        """One start of five is struck while it loads; others when they decode."""
        self._may_hang = False
        if self._rng.random() < 0.2:
            time.sleep(self._rng.uniform(0.0, 5.0))
            return
        log, until = self._folder.path / "events.jsonl", time.monotonic() + PATIENCE_S
        while process.poll() is None and _written_at(log) < began:
            assert time.monotonic() < until, "it does not begin"
            time.sleep(0.01)
        self._may_hang = True

    def _strike(self, process: subprocess.Popen[str]) -> bool:
        """Whether the run itself was killed."""
        victim, trainer = self._rng.choice(VICTIMS), _trainer_of(process.pid)
        if victim in {"trainer", "hang"} and trainer is None:
            return False
        if victim == "hang" and not self._may_hang:
            victim = "trainer"
        self._may_hang = False
        self._shared |= mapped_by(marked(str(self._folder.path)))
        with suppress(ProcessLookupError):
            if victim == "hang":
                assert trainer is not None
                os.kill(trainer, signal.SIGSTOP)
                self._wait_for_another(process, trainer)
            elif trainer is not None and victim != "run":
                os.kill(trainer, signal.SIGKILL)
        self.figures.killed[victim] += 1
        if victim in {"trainer", "hang"}:
            return False
        process.kill()
        return True

    def _wait_for_another(self, process: subprocess.Popen[str], trainer: int) -> None:
        """A stopped process hears of nothing: it is the run that has to end it."""
        until = time.monotonic() + PATIENCE_S
        while process.poll() is None and _trainer_of(process.pid) == trainer:
            assert time.monotonic() < until, "a trainer that hangs is still there"
            self._look_at_newest()
            time.sleep(0.01)

    # --- what is there behind it -------------------------------------------------------------

    def _start(self) -> subprocess.Popen[str]:
        mode = "--resume" if self._resume else "--overwrite"
        return subprocess.Popen(
            [sys.executable, "-m", "cosched.cli", "run", "-c", str(self._config), mode],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                 "TMPDIR": str(self._temporary), **mark(str(self._folder.path))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def _look_at_newest(self) -> None:
        """What an observer has been told: this state is whole."""
        with suppress(OSError, ValueError):
            self._newest = int((states_of(self._folder).folder / "newest").read_text())

    def _look_at_folder(self) -> None:
        """As the next start does."""
        states = states_of(self._folder)
        found = states.newest()
        self._resume = found is not None
        if found is None:
            self._newest = 0
            return
        number = int(found.name)
        self.figures.states_back += number < self._newest
        self.figures.damaged += sum(
            1 for path in states.folder.glob("0*") if not (path / "SHA256SUMS").exists()
        )
        progress, _ = load(self._folder)
        done = progress.groups_done
        log = self._folder.path / "events.jsonl"
        requests = log.read_bytes().count(b'"kind":"request"')
        self.figures.groups_lost.append(max(0, requests - done))
        self._newest = number

    def _look_for_leftovers(self) -> None:
        self.figures.left += left(str(self._folder.path), self._temporary, self._shared)

    def _ended_well(self) -> None:
        self.figures.finished += 1
        self.figures.other_texts += texts_of(self._folder.path) != self._texts
        self._resume = False


def texts_of(folder: Path) -> dict[str, str]:
    """What was answered, by request."""
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return {event["id"]: event["text"] for event in events if event["kind"] == "request"}


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _trainer_of(pid: int) -> int | None:
    """The newest process that trains for that one."""
    found: list[int] = []
    for task in listed(Path(f"/proc/{pid}/task")):
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return next((one for one in sorted(found, reverse=True) if TRAINER in command(one)), None)
