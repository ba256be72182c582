"""Damaged requests of operators, and damaged answers: refused in words, and what runs goes on."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cosched.engines.sglang.operators import routes
from cosched.engines.sglang.operators.control import LONGEST, VERBS, Client, Reply, SocketOperator
from cosched.engines.sglang.worker.operator import Command
from cosched.errors import ControlError
from tests.helpers.fuzz import (
    NASTY,
    cases,
    damaged_json,
    damaged_text,
    little_memory,
    nothing_written,
    only_ours,
)
from tests.helpers.serving import STATUS

BODIES = (b"{}", b'{"version": 3}', b'{"path": "monday"}', b'{"version": 0, "path": "a.b-c_1"}')
HEADERS = {
    "host": "127.0.0.1:30000", "origin": "http://x", "x-forwarded-for": "1.2.3.4", "forwarded": "for=x",
}  # fmt: skip
HOSTS = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "localhost", "", "fe80::1%eth0")


def test_a_damaged_body_is_one_clear_error(tmp_path: Path) -> None:
    """And a command that is taken names nothing outside the folder of checkpoints."""
    with nothing_written(tmp_path), little_memory():
        for case, rng in cases("bodies", 2000):
            verb, body = rng.choice(VERBS), damaged_json(rng, rng.choice(BODIES))
            with only_ours(case, (verb, body)):
                command = routes.command_of(verb, body, tmp_path)
                assert command.verb == verb
                assert command.path is None or Path(command.path).parent == tmp_path


def test_damaged_headers_are_answered_or_refused() -> None:
    """Whatever a client says of itself: an address that is not this machine's is refused."""
    for case, rng in cases("headers", 2000):
        host = _text(rng, rng.choice(HOSTS))
        headers = {key: _text(rng, HEADERS[key]) for key in HEADERS if rng.random() < 0.5}
        with only_ours(case, (host, headers)):
            refusal = routes.refused(rng.choice((SimpleNamespace(host=host), None)), headers)
            assert refusal is None or refusal.startswith("/cosched/ ")
            if refusal is None:
                assert not headers.keys() & {"origin", "x-forwarded-for", "forwarded"}


def _text(rng: random.Random, text: str) -> str:
    return damaged_text(rng, text) if rng.random() < 0.5 else text


def test_damaged_words_are_one_clear_error() -> None:
    """``cosched control VERB WHAT``."""
    for case, rng in cases("words", 2000):
        verb = _text(rng, rng.choice((*VERBS, "stop")))
        what = rng.choice((None, "3", "monday", *map(str, NASTY)))
        with only_ours(case, (verb, what)):
            json.dumps(routes.request_body(verb, what))


# --- over the socket ------------------------------------------------------------------------


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[SocketOperator]:
    made = SocketOperator(tmp_path / "socket", patience=5.0)
    done = threading.Event()

    def scheduler() -> None:
        while not done.is_set():
            for command, answer in made.asked():
                assert command.verb in VERBS
                answer(STATUS)
            done.wait(0.0005)

    thread = threading.Thread(target=scheduler)
    thread.start()
    yield made
    done.set()
    thread.join()
    made.close()


LINES = tuple(
    msgspec.json.encode(command)
    for command in (
        Command(verb="status"),
        Command(verb="rollback", version=2),
        Command(verb="save", path="/nowhere/at/all"),
    )
)


def test_a_damaged_line_is_answered_in_words(operator: SocketOperator, tmp_path: Path) -> None:
    """A thread that dies of one leaves its client without an answer."""
    with nothing_written(tmp_path):
        for case, rng in cases("lines", 400):
            line = damaged_json(rng, rng.choice(LINES)).split(b"\n")[0]
            answer = said(tmp_path / "socket", line)
            reply = msgspec.json.decode(answer, type=Reply)
            assert (reply.status is None) == bool(reply.error), f"input {case}: {line[:300]!r}"
            assert len(reply.error or "") < 4000, f"input {case}: {line[:300]!r}"
    assert Client([tmp_path / "socket"]).status() == STATUS


def said(path: Path, line: bytes) -> bytes:
    """What is answered to a line; of one that is too long the rest is not read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        try:
            connection.sendall(line + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            assert len(line) > LONGEST
        with connection.makefile("rb") as stream:
            return stream.readline()


def test_a_damaged_answer_is_one_clear_error(tmp_path: Path) -> None:
    """Of a server of another version, or of something else that listens there."""
    good = msgspec.json.encode(Reply(status=STATUS)) + b"\n"
    shown = msgspec.json.encode(STATUS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        answers: list[bytes] = []

        def serve() -> None:
            while True:
                connection, _ = listening.accept()
                with connection:
                    if not connection.recv(1 << 16):
                        return
                    try:
                        connection.sendall(answers.pop())
                    except (BrokenPipeError, ConnectionResetError):
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for case, rng in cases("answers", 400):
            answers.append(damaged_json(rng, good) + b"\n")
            with only_ours(case, answers[0][:800]):
                Client([tmp_path / "socket"]).ask(Command(verb="status"))
            changed = damaged_json(rng, shown)
            with only_ours(case, changed[:800]):
                routes.read_answer("http://x/cosched/status", changed)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(str(tmp_path / "socket"))
        thread.join(10)


# --- over HTTP --------------------------------------------------------------------------------


class Request:
    """A request as Starlette gives it: a body in pieces, which may never end."""

    def __init__(self, piece: bytes, times: int) -> None:
        self.piece, self.times, self.taken = piece, times, 0

    async def stream(self) -> Any:
        while self.taken < self.times:
            self.taken += 1
            yield self.piece


def test_a_body_that_does_not_end_is_not_kept() -> None:
    """It was taken in whole, into the memory of the process that answers all requests."""
    endless = Request(b" " * 1000, 1 << 40)
    with pytest.raises(ControlError, match=f"more than {LONGEST} bytes"):
        asyncio.run(routes.body_of(endless))
    assert endless.taken * 1000 <= LONGEST + 1000
    assert asyncio.run(routes.body_of(Request(b" {}", 1))) == b" {}"
    assert asyncio.run(routes.body_of(Request(b"", 0))) == b""
