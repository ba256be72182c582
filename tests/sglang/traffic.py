"""Clients of a server that is soaked: requests of all kinds, some that are given up, some that are wrong.

Each is a thread that does one thing after another until it is told to end, and keeps what went wrong.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

from tests.sglang.server import Server

LIMIT_S = 180.0  # for an answer: four are decoded at once, on cores that others use too
WRONG = (
    AssertionError, OSError, ValueError, openai.OpenAIError, http.client.HTTPException,
    httpx.HTTPError, subprocess.SubprocessError,
)  # fmt: skip
"""What may come of a request; anything else is a mistake of ours, and ends the thread."""

PROBE = "The three things that every sailor has to know are"

BAD_COMPLETIONS: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"model": "x"}',
    b'{"model": "x", "prompt": ""}',
    b'{"model": "x", "prompt": {"a": 1}}',
    b'{"model": "x", "prompt": [1, -7]}',
    b'{"model": "x", "prompt": [1, 1000000]}',
    b'{"model": "x", "prompt": "a", "max_tokens": -3}',
    b'{"model": "x", "prompt": "a", "max_tokens": "many"}',
    b'{"model": "x", "prompt": "a", "temperature": -1}',
    b'{"model": "x", "prompt": "a", "top_p": 7}',
    b'{"model": "x", "prompt": "a", "n": "three"}',
    b'{"model": "x", "prompt": "a", "logit_bias": {"-5": 1}}',
)
BAD_CHATS: tuple[bytes, ...] = (
    b'{"model": "x"}',
    b'{"model": "x", "messages": []}',
    b'{"model": "x", "messages": "hello"}',
    b'{"model": "x", "messages": [{"role": "user"}]}',
    b'{"model": "x", "messages": [{"role": 3, "content": "a"}]}',
)


@dataclass(frozen=True)
class Ended:
    """What was done, of which kind, at which second, and how long it took."""

    kind: str
    at: float
    seconds: float


class Loop(threading.Thread):
    """Does ``once`` again and again, ``pause_s`` apart, until it is told to end."""

    pause_s = 0.0

    def __init__(self, name: str, ending: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.ended: list[Ended] = []
        self.failures: list[str] = []
        self.doing = ""
        self._ending = ending
        self._began = time.monotonic()

    def once(self) -> None:
        """One thing; ``doing`` says what."""
        raise NotImplementedError

    def run(self) -> None:
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                self.once()
            except WRONG as error:
                said = f"{self.name}, {self.doing}: {type(error).__name__}: {error}"
                self.failures.append(said[:1000])
                self._ending.wait(1.0)  # a server that is gone is not asked a thousand times
            at = time.monotonic()
            self.ended.append(Ended(self.doing, at - self._began, at - began))
            self._ending.wait(self.pause_s)


class Client(Loop):
    """Somebody who asks for one thing after another, of a kind that is drawn."""

    def __init__(
        self, number: int, server: Server, texts: Sequence[str], ending: threading.Event
    ) -> None:
        super().__init__(f"client {number}", ending)
        self._rng = random.Random(f"soak {number}")
        self._url, self._texts = server.url, texts
        self._api = self._connect()

    def once(self) -> None:
        self.doing = self._rng.choices([*KINDS], [weight for weight, _ in KINDS.values()])[0]
        KINDS[self.doing][1](self)

    def run(self) -> None:
        super().run()
        self._api.close()

    def _connect(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self._url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0
        )

    def _asked(self, **more: Any) -> dict[str, Any]:
        usual = {
            "model": "x",
            "max_tokens": self._rng.randint(8, 48),
            "temperature": self._rng.choice((0.0, 0.0, 0.8)),
        }
        return {**usual, **more}

    def _messages(self) -> list[Any]:
        return [{"role": "user", "content": self._rng.choice(self._texts)}]

    # --- kinds of requests -----------------------------------------------------------------------

    def chat(self) -> None:
        asked = self._asked(messages=self._messages())
        answer = self._api.chat.completions.create(**asked)
        assert answer.choices[0].finish_reason in {"stop", "length"}, answer
        assert 0 < answer.usage.completion_tokens <= asked["max_tokens"], answer.usage

    def completion(self) -> None:
        asked = self._asked(prompt=self._rng.choice(self._texts))
        answer = self._api.completions.create(**asked, extra_body={"ignore_eos": True})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == asked["max_tokens"], answer.usage

    def streamed(self) -> None:
        asked = self._asked(messages=self._messages(), stream=True)
        stream = self._api.chat.completions.create(**asked)
        pieces = [choice for piece in stream for choice in piece.choices]
        assert pieces[-1].finish_reason in {"stop", "length"}, pieces[-1:]

    def several(self) -> None:
        number = self._rng.randint(2, 3)
        asked = self._asked(prompt=self._rng.choice(self._texts), n=number, max_tokens=16)
        answer = self._api.completions.create(**asked)
        assert [choice.index for choice in answer.choices] == list(range(number)), answer

    def stopped(self) -> None:
        """No answer has what it was to end at."""
        words = [" the", "\n", "e."]
        answer = self._api.completions.create(
            **self._asked(prompt=self._rng.choice(self._texts), stop=words)
        )
        text = answer.choices[0].text
        assert not any(word in text for word in words), text

    def given_up(self) -> None:
        """A stream that is closed after some pieces."""
        asked = self._asked(messages=self._messages(), stream=True, max_tokens=400)
        with self._api.chat.completions.create(**asked) as stream:
            for _ in zip(range(self._rng.randint(1, 8)), stream, strict=False):
                pass

    def hung_up(self) -> None:
        """Nothing is read, and the connection is closed while it is decoded, or while it waits."""
        body = json.dumps(self._asked(prompt=self._rng.choice(self._texts), max_tokens=400))
        where = urlsplit(self._url)
        with socket.create_connection((where.hostname, where.port), timeout=LIMIT_S) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            self._ending.wait(self._rng.uniform(0.0, 3.0))

    def connected_again(self) -> None:
        self._api.close()
        self._api = self._connect()
        answer = self._api.completions.create(**self._asked(prompt="Once", max_tokens=1))
        assert answer.choices[0].finish_reason in {"stop", "length"}, answer

    def too_long(self) -> None:
        """More than the target's context: refused, with the reason."""
        words = " ".join(self._rng.choice(("one", "two", "three")) for _ in range(20_000))
        try:
            self._api.completions.create(**self._asked(prompt=words))
        except openai.BadRequestError as error:
            said = str(error)
            assert "long" in said or "exceed" in said, said
        else:
            raise AssertionError("a prompt of 20,000 words was taken")

    def malformed(self) -> None:
        """Refused as the client's own mistake."""
        path, bodies = self._rng.choice(
            (("completions", BAD_COMPLETIONS), ("chat/completions", BAD_CHATS))
        )
        body = self._rng.choice(bodies)
        code = post(f"{self._url}/v1/{path}", body)
        assert 400 <= code < 500, f"{code} for {body!r}"


KINDS: dict[str, tuple[int, Callable[[Client], None]]] = {
    "chat": (4, Client.chat),
    "completion": (4, Client.completion),
    "streamed": (4, Client.streamed),
    "n > 1": (2, Client.several),
    "stop strings": (2, Client.stopped),
    "stream given up": (2, Client.given_up),
    "hung up": (2, Client.hung_up),
    "connected again": (1, Client.connected_again),
    "prompt too long": (1, Client.too_long),
    "malformed": (2, Client.malformed),
}
"""How often each is drawn, and what it is."""


def post(url: str, body: bytes) -> int:
    """The code that it is answered with."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


class Prober(Loop):
    """Asks for the same greedy text all along."""

    pause_s = 5.0

    def __init__(self, server: Server, ending: threading.Event) -> None:
        super().__init__("probe", ending)
        self.texts: Counter[str] = Counter()
        self._server = server

    def once(self) -> None:
        self.doing = "probe"
        with openai.OpenAI(
            base_url=f"{self._server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0
        ) as api:
            answer = api.completions.create(
                model="x", prompt=PROBE, max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
            )  # fmt: skip
        self.texts[answer.choices[0].text] += 1


STEPS: tuple[tuple[int, str], ...] = (
    (0, "save saved-{turn}"),
    (1, "save saved-{turn}"),  # it is there
    (0, "off"),
    (0, "status"),
    (0, "on"),
    (1, "save ../elsewhere"),
    (0, "rollback 0"),
    (2, "rollback yesterday"),
)
"""What an operator types, and the code that it ends with."""


class Operator(Loop):
    """Types ``cosched control``, one step after another, and takes away what was saved."""

    def __init__(self, server: Server, pause_s: float, ending: threading.Event) -> None:
        super().__init__("operator", ending)
        self.pause_s = pause_s
        self._server, self._number = server, 0
        (self._checkpoints,) = server.runs.glob("*/*/checkpoints")

    def once(self) -> None:
        turn, step = divmod(self._number, len(STEPS))
        self._number += 1
        code, words = STEPS[step]
        self.doing = f"control {words.split()[0]}"
        typed = words.format(turn=turn).split()
        told = self._server.command("control", *typed, "--url", self._server.url)
        assert told.returncode == code, (typed, told.returncode, told.stdout, told.stderr)
        if step == 1:
            shutil.rmtree(self._checkpoints / f"saved-{turn}")
