"""A trainer in a process of its own, and servers of the tiny world that follow it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cosched.build.embedded import Arm, World, build_arm, build_world
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from tests.helpers.guarded_runs import Events
from tests.helpers.paths import ROOT, TINYWORLD

PATIENCE_S = 60.0
LIMIT_S = 2.0  # after which the one takes the other for lost


def configured(folder: Path, *overrides: str) -> Config:
    """Greedy answers whose every row is computed alike, a draft that learns often, a socket in the folder."""
    path = folder / "sidecar.yaml"
    settings = {
        "run": {"name": "many", "dir": str(folder / "runs")},
        "engine": {"num_threads": 1, "exact": True, "device": "cpu"},
        "target": {"path": f"{TINYWORLD}/target"},
        "drafter": {"kind": "eagle3", "path": f"{TINYWORLD}/eagle3", "num_draft_tokens": 3},
        "workload": {
            "prompts": f"{TINYWORLD}/prompts/translated.jsonl",
            "max_new_tokens": 64,
            "max_prompts": 1,
        },
        "arms": ["plain", "adapted"],
        "adapt": {
            "placement": "sidecar",
            "policy": {"kind": "every_n_rounds", "rounds": 8},
            "replay": {"window": 64, "anchors": 16},
            "guard": {"kind": "finite"},
            "sidecar": {"address": f"ipc://{folder}/s", "limit_seconds": LIMIT_S},
        },
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    return load_config(path, overrides)


class Trainer:
    """``cosched train`` of that folder, and what it says of itself; of several ranks by torch's launcher."""

    def __init__(self, folder: Path, *words: str, ranks: int = 1) -> None:
        self.log = folder / f"trainer-{time.monotonic_ns()}.log"
        self._status = folder / "runs" / "many-trainer" / "status.json"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        command = ("-m", "cosched.cli", "train", "-c", str(folder / "sidecar.yaml"), *words)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(launcher if ranks > 1 else ()), *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self._status.read_text())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal that ends it."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def trainer(folder: Path, *words: str, ranks: int = 1) -> Iterator[Trainer]:
    """One that is ended, if it is there yet: killed, unless ranks would outlive their launcher."""
    made = Trainer(folder, *words, ranks=ranks)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.end(signal.SIGKILL if ranks == 1 else signal.SIGTERM)


class Server:
    """An engine that follows: its texts, its versions and its troubles."""

    def __init__(self, world: World) -> None:
        self.events = Events()
        self._world = world
        self.arm: Arm = build_arm(world, "adapted", self.events)
        self.follower: Any = self.arm.coscheduler
        self.versions: list[int] = []

    def answer(self) -> list[list[int]]:
        """All requests once more."""
        texts = [list(done.tokens) for done in self.arm.engine.generate(self._world.requests)]
        self.versions.append(self.follower.version)
        return texts

    def close(self) -> None:
        self.follower.link.close()


@contextmanager
def servers(config: Config, number: int) -> Iterator[list[Server]]:
    """So many, with one target between them."""
    world = build_world(config)
    made = [Server(world) for _ in range(number)]
    try:
        yield made
    finally:
        for one in made:
            one.close()


def serve_until(
    running: list[Server], done: Callable[[], bool], patience_s: float = PATIENCE_S
) -> list[list[list[int]]]:
    """Let all answer, in turn, until something is so; their texts."""
    texts: list[list[list[int]]] = []
    until = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < until, [(one.follower.version, one.events.all) for one in running]
        texts += [one.answer() for one in running]
        time.sleep(0.01)
    return texts


def plain_texts(world: World) -> list[list[int]]:
    """What the target says without a draft."""
    arm = build_arm(world, "plain", Events())
    return [list(done.tokens) for done in arm.engine.generate(world.requests)]
