"""Two servers and one trainer, all processes of their own: what the one serves, both learn from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.sglang.client import complete
from tests.sglang.server import Server, Start, until
from tests.sglang.serving import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # three starts, on a busy machine

CONFIG = "configs/sidecar_tiny_cpu.yaml"
SOON = ("adapt.policy.rounds=8", "adapt.guard={kind: finite}", "adapt.sidecar.limit_seconds=3")


@pytest.fixture
def trainer(
    bare_environment: dict[str, str], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A trainer, and the words that servers need to find it."""
    address = f"adapt.sidecar.address=ipc://{tmp_path}/s"
    words = [*SOON, address, f"run.dir={tmp_path}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cosched.cli", "train", "-c", CONFIG, *words],
            env=bare_environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    yield process, address
    if process.poll() is None:
        process.kill()
        process.wait()


def ask(server: Server) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        return str(complete(client, 0, 96))


def test_two_servers_serve_what_one_trainer_learns_and_go_on_without_it(
    trainer: tuple[subprocess.Popen[bytes], str], start: Start, tmp_path: Path
) -> None:
    """Only one is asked, which has two ranks, and both serve what came of it; killed, the trainer is missed in
    the status of both, and the text is what it was."""
    process, address = trainer
    ours = (*SOON, address)
    asked = start(*ours, "run.name=a", "--tp-size", "2", config=CONFIG)
    quiet = start(*ours, "run.name=b", config=CONFIG)

    def status(server: Server) -> dict[str, Any]:
        return server.get("/cosched/status")

    first = ask(asked)

    def learnt() -> bool:
        assert ask(asked) == first
        return status(quiet)["draft_version"] >= 2

    until(learnt)
    assert status(asked)["updates"] >= 2
    assert status(asked)["failure"] is status(quiet)["failure"] is None
    until(lambda: status(asked)["draft_version"] == status(quiet)["draft_version"])
    shown = json.loads((tmp_path / "sidecar_tiny_cpu-trainer" / "status.json").read_text())
    assert len(shown["servers"]) == 3  # each rank is one
    assert [one["rounds"] for one in shown["servers"].values()].count(
        0
    ) == 1  # the second sends none
    process.kill()
    process.wait()
    until(lambda: all("no trainer" in str(status(one)["warning"]) for one in (asked, quiet)))
    assert ask(asked) == first == ask(quiet)
    assert status(asked)["failure"] is None


def test_replicas_of_one_server_serve_one_draft(
    trainer: tuple[subprocess.Popen[bytes], str], start: Start, tmp_path: Path
) -> None:
    """SGLang's ``--dp-size``: both answer, learn, are told what to do and are shown, each by its number."""
    _, address = trainer
    server = start(*SOON, address, "--dp-size", "2", "--enable-metrics", config=CONFIG)

    def status(replica: int) -> dict[str, Any]:
        return server.get(f"/cosched/status?replica={replica}")

    first = ask(server)

    def learnt() -> bool:
        assert ask(server) == first
        return all(status(replica)["draft_version"] >= 2 for replica in range(2))

    until(learnt)
    for replica in range(2):
        shown = status(replica)
        assert (shown["replica"], shown["replicas"]) == (replica, 2)
        assert shown["rounds"] > 0
        assert shown["failure"] is None
    assert server.call("/cosched/status?replica=2")[0] == 400
    trainers = json.loads((tmp_path / "sidecar_tiny_cpu-trainer" / "status.json").read_text())
    assert sum(one["rounds"] > 0 for one in trainers["servers"].values()) == 2
    assert server.command("control", "off", "--url", server.url).returncode == 0
    assert not any(status(replica)["adapting"] for replica in range(2))
    metrics = server.get("/metrics")
    for replica in range(2):
        assert f'cosched_rounds_total{{dp_rank="{replica}",' in metrics
    printed = server.command("control", "status", "--replica", "1", "--url", server.url).stdout
    assert "replica                   1" in printed
    assert ask(server) == first
