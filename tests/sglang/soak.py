"""A server under mixed requests for a long time, whose trainer is lost again and again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.leftovers import command, left, mapped_by, mark, marked
from tests.helpers.resident import Resident
from tests.sglang.server import PATIENCE, Server, launch
from tests.sglang.serving import ROOT
from tests.sglang.soak_figures import Figures
from tests.sglang.traffic import Client, Loop, Operator, Prober

LOOK_EVERY_S = 5.0
CLIENTS = 5  # for four places, so that somebody always waits
LOSSES = (
    6  # of a trainer at most, in the first half of the time: in the second its memory is watched
)
TRAINER = b"cosched.training.process"
SOCKET = "trainer.sock"  # of a trainer of its own; its lock file stays for good


@dataclass(frozen=True)
class Plan:
    """``words`` are settings of the file ``config``; ``texts`` what the clients ask."""

    config: str
    words: Sequence[str]
    texts: Sequence[str]
    minutes: float
    placement: str


class Killer(Loop):
    """Loses the trainer, half a pause after it began and then every pause; ``lost`` counts the signals."""

    doing = "lose the trainer"

    def __init__(self, minutes: float, ending: threading.Event) -> None:
        super().__init__("killer", ending)
        self.doing = "lose the trainer"
        self.lost: Counter[str] = Counter()
        self._losses = min(LOSSES, max(1, round(minutes / 4)))
        self.pause_s = 60 * minutes / 2 / self._losses / 1.5

    def once(self) -> None:
        if self.lost.total() < self._losses and not self._ending.wait(self.pause_s / 2):
            self.lose()

    def lose(self) -> None:
        """One of them, and wait until there is another."""
        raise NotImplementedError

    def stop(self) -> int:
        """What it ends with that is to be told to stop beside the server."""
        return 0


class KillsBeside(Killer):
    """SIGKILL of the process that trains beside the server, which has to start another."""

    def __init__(self, run: str, minutes: float, ending: threading.Event) -> None:
        super().__init__(minutes, ending)
        self._run = run

    def lose(self) -> None:
        before = self._trainers()
        assert len(before) == 1, f"{len(before)} trainers"
        os.kill(before[0], signal.SIGKILL)
        self.lost["SIGKILL"] += 1
        until = time.monotonic() + PATIENCE
        while not set(self._trainers()) - set(before):
            assert time.monotonic() < until, "there is no other trainer"
            time.sleep(0.2)

    def _trainers(self) -> list[int]:
        return [pid for pid in marked(self._run) if TRAINER in command(pid)]


class KillsSidecar(Killer):
    """SIGKILL and SIGTERM in turns of a trainer of its own, which is started again after a while."""

    alone_s = 8.0  # that the server has none: longer than ``limit_seconds``

    def __init__(
        self, words: Sequence[str], server: Server, minutes: float, ending: threading.Event
    ) -> None:
        super().__init__(minutes, ending)
        self._words, self._environment = words, server.environment
        self._log = server.runs.parent / "trainer.log"
        self._process = self._start()

    def lose(self) -> None:
        how = (signal.SIGKILL, signal.SIGTERM)[self.lost.total() % 2]
        assert self._process.poll() is None, f"it has ended: {self._log.read_text()[-2000:]}"
        self.lost[how.name] += 1
        code = self.stop(how)
        assert code == (0 if how == signal.SIGTERM else -how), f"{how.name}: ended with {code}"
        self._ending.wait(self.alone_s)
        self._process = self._start()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self._process.send_signal(how)
        return self._process.wait(60)

    def _start(self) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "cosched.cli", "train", "--resume", *self._words]
        with self._log.open("ab") as log:
            return subprocess.Popen(line, env=self._environment, cwd=ROOT, stdout=log, stderr=log)


class Soak:
    """One server; all that it writes goes below ``folder``."""

    def __init__(self, plan: Plan, folder: Path, environment: dict[str, str]) -> None:
        self.figures = Figures(plan.placement, plan.minutes)
        self._plan, self._folder, self._temporary = plan, folder, folder / "tmp"
        self._temporary.mkdir()
        self._shared: set[Path] = set()
        self._resident = Resident(str(folder))
        self._ending = threading.Event()
        self._environment = {
            **environment,
            **mark(str(folder)),
            "TMPDIR": str(self._temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),  # PyTorch's, kept on purpose
        }

    def run(self) -> Figures:
        """Start it, ask it, lose its trainer, end it, and look at what is there then."""
        words = [*self._plan.words, f"adapt.placement={self._plan.placement}"]
        server = launch(self._plan.config, words, self._folder, self._environment)
        try:
            server.wait()
            self._load(server, words)
            self.figures.codes["server"] = server.stop()
        finally:
            self._ending.set()
            shared = self._shared | {self._folder / SOCKET}
            self.figures.left = left(str(self._folder), self._temporary, shared)
        self._read(server.runs)
        return self.figures

    def _load(self, server: Server, words: Sequence[str]) -> None:
        seconds, figures = 60 * self._plan.minutes, self.figures
        killer, prober = self._killer(server, words), Prober(server, self._ending)
        prober.once()  # alone, as yet
        operator = Operator(server, min(20.0, seconds / 30), self._ending)
        clients = [Client(n, server, self._plan.texts, self._ending) for n in range(CLIENTS)]
        loops: list[Loop] = [*clients, prober, operator, killer]
        for loop in loops:
            loop.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._look(server)
            assert all(loop.is_alive() for loop in loops), [
                x.name for x in loops if not x.is_alive()
            ]
            time.sleep(LOOK_EVERY_S)
        self._ending.set()
        for loop in loops:
            loop.join(2 * PATIENCE)
        figures.failures += [failure for loop in loops for failure in loop.failures]
        figures.failures += [
            f"{loop.name} still does {loop.doing}" for loop in loops if loop.is_alive()
        ]
        figures.by_client = {client.name: len(client.ended) for client in clients}
        figures.lost, figures.texts = dict(killer.lost), dict(prober.texts)
        self._count([*clients, prober])
        self._at_end(server, killer)

    def _killer(self, server: Server, words: Sequence[str]) -> Killer:
        if self._plan.placement == "colocated":
            return KillsBeside(str(self._folder), self._plan.minutes, self._ending)
        own = ["-c", self._plan.config, *words, f"run.dir={server.runs}"]
        return KillsSidecar(own, server, self._plan.minutes, self._ending)

    def _look(self, server: Server) -> None:
        self._shared |= mapped_by(self._resident.look())
        status = server.get("/cosched/status")
        self.figures.versions.append(status["draft_version"])
        self.figures.updates.append(status["updates"])
        for name in ("failure", "warning"):
            said = status[name]
            if said and said not in self.figures.warnings:
                self.figures.warnings.append(said)
            if said and name == "failure":
                self.figures.failures.append(said)

    def _count(self, asking: list[Any]) -> None:
        by_kind: dict[str, list[float]] = {}
        for ended in (one for loop in asking for one in loop.ended):
            by_kind.setdefault(ended.kind, []).append(ended.seconds)
        self.figures.requests = {kind: len(all_s) for kind, all_s in sorted(by_kind.items())}
        self.figures.seconds = {
            kind: (statistics.median(all_s), max(all_s)) for kind, all_s in by_kind.items()
        }

    def _at_end(self, server: Server, killer: Killer) -> None:
        """It learns again, has nothing to complain of, and nothing runs any more."""
        until = time.monotonic() + PATIENCE
        server.call("/cosched/on", {})
        while (status := server.get("/cosched/status"))["warning"] and time.monotonic() < until:
            time.sleep(1.0)
        for name in ("failure", "warning"):
            if status[name]:
                self.figures.failures.append(f"at the end: {status[name]}")
        while running := server.get("/v1/loads")["loads"][0]["num_running_reqs"]:
            if time.monotonic() > until:
                self.figures.failures.append(f"at the end {running} requests still run")
                break
            time.sleep(1.0)
        self.figures.acceptance_length = status["acceptance_length"]
        self.figures.codes["trainer"] = killer.stop()

    def _read(self, runs: Path) -> None:
        """What the learner has written down, and how memory went."""
        pattern = (
            "*-trainer/events.jsonl" if self._plan.placement == "sidecar" else "*/*/events.jsonl"
        )
        (path,) = runs.glob(pattern)
        kinds = Counter(json.loads(line)["kind"] for line in path.read_text().splitlines())
        self.figures.learnt = kinds["publication"] - kinds["rollback"]
        self.figures.memory = [
            {"pid": pid, **dataclasses.asdict(process), "slope": process.slope}
            for pid, process in self._resident.processes.items()
        ]
