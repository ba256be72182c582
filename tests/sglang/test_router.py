"""SGLang's router before two servers of one trainer: the deployment of docs/sidecar.md, every process real."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.sglang.client import complete, prompt
from tests.sglang.server import Server, Start, free_port, until
from tests.sglang.serving import ROOT, WORLD, Decode

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(900),  # five starts, on a busy machine
    pytest.mark.skipif(
        importlib.util.find_spec("sglang_router") is None,
        reason="SGLang's router is not installed (pip install --no-deps sglang-router)",
    ),
]

CONFIG = "configs/sidecar_tiny_cpu.yaml"
SOON = ("adapt.policy.rounds=8", "adapt.guard={kind: finite}", "adapt.sidecar.limit_seconds=3")
KEY = "a-key-of-this-test"
# Else it tries a dead server five times and gives up: it sends a prompt where it sent one like it.
GIVES_UP_ON_A_SERVER = ("--cb-failure-threshold", "3")
RETRIES = "smg_worker_retries_total"
SIGNED = {"Authorization": f"Bearer {KEY}"}
PROMPTS, TOKENS = 4, 96

Run = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts a module of Python's; what is left of them is killed in the end."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*words: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{words[0]}.log").open("wb") as log:
            line = [sys.executable, "-m", *words]
            running.append(subprocess.Popen(line, env=env, cwd=ROOT, stdout=log, stderr=log))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def plain_texts(decode: Decode) -> list[str]:
    """Of the target alone, without a draft, a trainer or a router."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "target")
    prompts = [tokenizer(prompt(number))["input_ids"] for number in range(PROMPTS)]
    answers = decode("float32", texts=prompts, num_tokens=TOKENS)
    return [tokenizer.decode(one["tokens"], skip_special_tokens=True) for one in answers]


def routed(run: Run, servers: list[Server]) -> tuple[str, str]:
    """The addresses of a router that knows all of the servers, and of its metrics."""
    port, metrics_port = free_port(), free_port()
    ports = "--port", str(port), "--prometheus-port", str(metrics_port)
    words = "--host", "127.0.0.1", *ports, "--api-key", KEY, *GIVES_UP_ON_A_SERVER
    urls = [server.url for server in servers]
    process = run("sglang_router.launch_router", *words, "--worker-urls", *urls)
    url = f"http://127.0.0.1:{port}"

    def all_known() -> bool:
        assert process.poll() is None
        request = urllib.request.Request(f"{url}/workers", headers=SIGNED)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                workers = json.load(response)["workers"]
        except urllib.error.URLError:
            return False
        return len(workers) == len(servers) and all(one["is_healthy"] for one in workers)

    until(all_known)
    return url, f"http://127.0.0.1:{metrics_port}/metrics"


def retries(metrics_url: str) -> float:
    """Requests that the router has sent again."""
    with urllib.request.urlopen(metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(RETRIES))


def test_clients_of_a_router_are_answered_while_servers_learn_and_when_one_is_killed(
    run: Run, start: Start, decode: Decode, bare_environment: dict[str, str], tmp_path: Path
) -> None:
    """Clients get the text of plain decoding, whoever answers, and all of one key; both servers are asked, and
    serve one draft. The one that the router prefers for a prompt is killed: no request fails, though it is sent
    there first, and the other server goes on learning."""
    expected = plain_texts(decode)
    words = [*SOON, f"adapt.sidecar.address=ipc://{tmp_path}/s"]
    run("cosched.cli", "train", "-c", CONFIG, *words, f"run.dir={tmp_path}", env=bare_environment)
    servers = [
        start(*words, f"run.name={name}", "--api-key", KEY, config=CONFIG)
        for name in ("left", "right")
    ]

    def status(server: Server) -> dict[str, Any]:
        return server.get("/cosched/status", **SIGNED)

    def known_to_the_trainer() -> int:
        shown = json.loads((tmp_path / "sidecar_tiny_cpu-trainer" / "status.json").read_text())
        return len(shown["servers"])

    numbers = count()
    router, metrics = routed(run, servers)
    url = f"{router}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, timeout=120, max_retries=0) as client:

        def ask(number: int) -> None:
            assert complete(client, number, TOKENS) == expected[number]

        def both_learnt() -> bool:
            ask(next(numbers) % PROMPTS)
            return all(status(one)["draft_version"] >= 2 for one in servers)

        until(both_learnt)
        until(lambda: len({status(one)["draft_version"] for one in servers}) == 1)
        before = [status(one)["rounds"] for one in servers]
        assert all(before)
        assert known_to_the_trainer() == 2

        ask(0)
        rounds = [status(one)["rounds"] - was for one, was in zip(servers, before, strict=True)]
        preferred = rounds.index(max(rounds))
        killed, left = servers[preferred], servers[1 - preferred]
        assert retries(metrics) == 0
        killed.process.kill()
        killed.process.wait()
        version = status(left)["draft_version"]
        for number in range(2 * PROMPTS):
            ask(number % PROMPTS)
        assert retries(metrics) > 0

        def learns_on() -> bool:
            ask(next(numbers) % PROMPTS)
            return status(left)["draft_version"] > version + 1

        until(learns_on)
        until(lambda: known_to_the_trainer() == 1)
        assert status(left)["failure"] is status(left)["warning"] is None
    stranger = openai.OpenAI(base_url=url, api_key="another", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        complete(stranger, 0)
