"""A server that is killed and comes back: what it had learnt is there, and others' is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from safetensors.torch import load_file

from cosched.telemetry.saved_states import SavedStates
from tests.sglang.client import complete
from tests.sglang.server import CONFIG, Server, launch, until
from tests.sglang.serving import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # several starts, on a busy machine

WORDS = ("adapt.policy.rounds=4", "adapt.guard.kind=finite", "adapt.checkpoint.every_updates=4")


@pytest.fixture
def server(bare_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server in the same folder as the one before, on another port."""
    started: list[Server] = []

    def start(*words: str) -> Server:
        started.append(launch(CONFIG, [*WORDS, *words], tmp_path, bare_environment))
        started[-1].wait()
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.stop()


def ask(server: Server, *numbers: int) -> list[str]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        return [str(complete(client, number, 160)) for number in numbers]


def newest(server: Server) -> tuple[Path, dict[str, Any]]:
    """The newest saved state, and what it says; all starts of one learning have one folder."""
    (folder,) = (server.runs / "serve_tiny_cpu").glob("*/state")
    path = SavedStates(folder).newest()
    assert path is not None
    return path, json.loads((path / "state.json").read_text())


def kill(server: Server) -> None:
    """All of its processes at once, without a word."""
    whole = psutil.Process(server.process.pid)
    processes = [*whole.children(recursive=True), whole]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, 30)
    server.process.wait(30)


def test_a_killed_server_goes_on_and_a_stopped_one_saves(server: Callable[..., Server]) -> None:
    """``--resume`` serves the version that was saved last, whose optimizer and counters go on; what was
    learnt otherwise is refused by its key before a model is loaded; SIGTERM saves the last version."""
    first = server("--resume")  # as a service has it: the first time there is nothing
    assert "nothing to resume" in first.log.read_text()
    texts = ask(first, 0, 1)
    status = until(lambda: told(first, lambda s: s["updates"] >= 8))
    assert status["warning"] is None
    until(lambda: newest_there(first))
    before = newest(first)[1]["version"]
    kill(first)
    path, state = newest(first)
    assert state["version"] >= max(before, 1)
    assert state["trains"]
    draft = load_file(path / "draft" / "model.safetensors")
    assert draft
    assert (path / "draft" / "config.json").exists()

    refused = subprocess.run(
        [sys.executable, "-m", "cosched.cli", "serve", "-c", CONFIG, "--resume", *WORDS,
         f"run.dir={os.path.relpath(first.runs, ROOT)}", "adapt.trainer.lr=0.5"],
        env=first.environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode == 2, refused.stderr[-4000:]
    assert "adapt.trainer.lr: what was saved in" in refused.stderr
    assert "now it is 0.5" in refused.stderr

    second = server("--resume")
    goes_on = rf"goes on from \S+/state/{path.name}, version {state['version']} of the draft"
    assert re.search(goes_on, second.log.read_text())
    status = second.get("/cosched/status")  # SGLang has asked itself something by now
    assert 0 <= status["draft_version"] - state["version"] < 5
    assert 0 <= status["updates"] - state["counters"]["updates"] < 5
    assert 0 <= status["rounds"] - state["counters"]["rounds"] < 50
    assert ask(second, 0, 1) == texts
    learnt = until(lambda: told(second, lambda s: s["updates"] > status["updates"] + 2))
    assert second.stop() == 0, second.log.read_text()[-4000:]
    path, last = newest(second)
    assert last["version"] >= learnt["draft_version"]
    assert last["counters"]["updates"] >= learnt["updates"]
    assert len(list(path.parent.glob("0*"))) <= 2


def told(server: Server, right: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    status = server.get("/cosched/status")
    assert status["failure"] is None
    return status if right(status) else None


def newest_there(server: Server) -> bool:
    (folder,) = (server.runs / "serve_tiny_cpu").glob("*/state")
    return SavedStates(folder).newest() is not None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_server_outlives_its_trainer(server: Callable[..., Server], how: int) -> None:
    """It answers the same while there is none, says so in its status, metrics and history, and learns on
    when there is another."""
    one = server(
        "adapt.trainer.background=true", "adapt.trainer.limit_seconds=20", "--enable-metrics"
    )
    texts = ask(one, 0, 1)
    until(lambda: told(one, lambda s: s["updates"] >= 2))
    (trainer,) = [
        process
        for process in psutil.Process(one.process.pid).children(recursive=True)
        if "cosched.training.process" in process.cmdline()
    ]
    os.kill(trainer.pid, how)
    assert ask(one, 0, 1) == texts
    until(lambda: "it is started again (1 of 3)" in " ".join(warnings(one)))
    before = until(lambda: told(one, lambda s: s["warning"] is None))
    assert ask(one, 0, 1) == texts
    until(lambda: told(one, lambda s: s["updates"] > before["updates"]))
    assert not psutil.pid_exists(trainer.pid)
    assert one.stop() == 0, one.log.read_text()[-4000:]


def warnings(server: Server) -> list[str]:
    (path,) = (server.runs / "serve_tiny_cpu").glob("*/events.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event["reason"] for event in events if event["kind"] == "warning"]
