"""What a server is spared and what it leaves: requests that would end it, and the draft when it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from cosched.loop.learner_state import read_state
from cosched.telemetry.saved_states import SavedStates
from tests.sglang.client import complete
from tests.sglang.server import CONFIG, Server, Start
from tests.sglang.serving import ROOT

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def server(start_shared: Start) -> Server:
    """It saves every few updates; its guard lets every candidate serve."""
    words = ["adapt.policy.rounds=4", "adapt.guard.kind=finite", "adapt.checkpoint.every_updates=8"]
    return start_shared(*words, "--enable-metrics")


def test_a_token_that_does_not_exist_ends_a_request_and_not_the_server(server: Server) -> None:
    """Plain SGLang's scheduler dies of it, and with it everybody's requests."""
    for ids in ([3, 10**6], [-1, 3]):
        code, said = server.call(
            "/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 4}},
            **{"Content-Type": "application/json"},
        )  # fmt: skip
        assert code == 400, said
        assert "there is no token" in json.dumps(said)
    assert server.call("/health")[0] == 200


def test_a_second_server_on_its_port_says_so_before_it_loads_anything(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    process = subprocess.run(
        [sys.executable, "-m", "cosched.cli", "serve", "-c", CONFIG, "--port", port],
        env=server.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1, process.stderr[-4000:]
    assert f"--port {port}: the server cannot listen there" in process.stderr[-400:]
    assert "ready to roll" not in process.stderr


def test_what_was_learnt_outlives_the_server(server: Server) -> None:
    """Saved now and then, the newest two kept, and again when it is told to stop; what was done to the
    draft is written down beside it."""
    (folder,) = (server.runs / "serve_tiny_cpu").iterdir()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        for number in range(4):
            complete(client, number, 160)
    status = server.settled()
    assert status["failure"] is None
    assert status["draft_version"] >= 24
    kept = versions(folder)
    assert len(kept) == 2
    assert kept[1] - kept[0] >= 8  # while one is written the next waits
    assert server.stop() == 0, server.log.read_text()[-4000:]
    at_end = versions(folder)
    assert len(at_end) == 2
    assert at_end[-1] >= status["draft_version"]
    newest = SavedStates(folder / "state").newest()
    assert newest is not None
    assert {path.name for path in (newest / "draft").iterdir()} >= {
        "config.json",
        "model.safetensors",
    }
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    kinds = {event["kind"] for event in events}
    assert kinds >= {"decision", "update", "publication"}
    assert "round" not in kinds  # a server has millions
    assert all(event["time"] > 1.6e9 for event in events)


def versions(folder: Path) -> list[int]:
    paths = sorted((folder / "state").glob("0*"))
    return [read_state(path).version for path in paths]
