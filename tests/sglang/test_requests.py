"""Kinds of requests that people send: each is answered as SGLang without cosched answers it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.sglang.client import prompt
from tests.sglang.server import Server, Start, free_port
from tests.sglang.serving import WORLD

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

CHUNK = ("--chunked-prefill-size", "64")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
LONG = "\n".join(prompt(number) for number in range(4))


def completion(text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    usual = {"model": "tiny", "prompt": text, "max_tokens": 48, "temperature": 0}
    return "/v1/completions", {**usual, **more}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "three answers of one prompt": completion(prompt(0), n=3),
    "a stop string": completion(prompt(1), stop=["e", "\n"]),
    "at least so many tokens": completion(prompt(1), stop=["e"], min_tokens=8, ignore_eos=True),
    "log probabilities": completion(prompt(2), logprobs=2),
    "a JSON schema": (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": prompt(0)[:200]}],
            "max_tokens": 64,
            "temperature": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
            },
        },
    ),
    "a regular expression": completion(prompt(3), regex="[a-z]{4,12}( [a-z]{2,9}){3}"),
    "a prompt in several chunks": completion(LONG),
    "the same prompt and more": completion(LONG + prompt(5)),
    "a forbidden word": completion(prompt(4), logit_bias={"100": -100}),
    "one token": completion(prompt(4), max_tokens=1),
}


@pytest.fixture(scope="module")
def stock(
    server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """SGLang itself, without a draft; cosched's CPU plugin does nothing to it then."""
    folder, port = tmp_path_factory.mktemp("stock"), free_port()
    log = folder / "log"
    words = [
        *("--model-path", str(WORLD / "target"), "--port", str(port), "--device", "cpu"),
        *("--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph"),
        *("--max-total-tokens", "16384", "--mem-fraction-static", "0.3"),
        *("--max-running-requests", "4", "--sleep-on-idle", *CHUNK),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *words],
            env=server_environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    server = Server(process, f"http://127.0.0.1:{port}", log, folder, server_environment)
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(start_shared: Start) -> Server:
    return start_shared("adapt.policy.rounds=4", *CHUNK)


def texts(server: Server, kind: str) -> list[str]:
    path, body = KINDS[kind]
    code, answer = server.call(path, body, **{"Content-Type": "application/json"})
    assert code == 200, answer
    return [
        one["text"] if "text" in one else one["message"]["content"] for one in answer["choices"]
    ]


def test_every_kind_is_answered_as_without_us(server: Server, stock: Server) -> None:
    """One by one, then all at once, again and again, while versions are published; and nothing of them is
    left behind: the draft goes on learning from what comes next."""
    expected = {kind: texts(stock, kind) for kind in KINDS}
    assert len(set(expected["three answers of one prompt"])) == 1
    assert {kind: texts(server, kind) for kind in KINDS} == expected
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(KINDS, pool.map(lambda kind: texts(server, kind), KINDS), strict=True))
        assert found == expected
    before = server.get("/cosched/status")
    assert before["draft_version"] > 3
    for _ in range(2):
        texts(server, "a prompt in several chunks")
    after = server.get("/cosched/status")
    assert after["updates"] > before["updates"]
    assert (after["failure"], after["warning"]) == (None, None)


def test_what_does_not_fit_is_refused_as_without_us(server: Server, stock: Server) -> None:
    """With the same code, and the server goes on."""
    path, body = completion(LONG * 40)
    codes = [
        one.call(path, body, **{"Content-Type": "application/json"})[0] for one in (server, stock)
    ]
    assert codes == [400, 400]
    assert texts(server, "one token") == texts(stock, "one token")
