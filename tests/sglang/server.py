"""A running ``cosched serve``, as tests and their users see it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sglang import preforked
from tests.sglang.serving import ROOT

CONFIG = "configs/serve_tiny_cpu.yaml"
PATIENCE = 240  # seconds for a start, on a busy machine


@dataclass
class Server:
    """A running ``cosched serve``."""

    process: preforked.Process
    url: str
    log: Path
    runs: Path
    environment: dict[str, str]

    def get(self, path: str, **headers: str) -> Any:
        return self.call(path, None, **headers)[1]

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status code and content; POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                code, raw = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                code, raw = error.code, error.read()
        try:
            return code, json.loads(raw)
        except ValueError:
            return code, raw.decode()

    def settled(self) -> Any:
        """The status once it shows no new rounds, of a server that is asked nothing: an idle tick shows
        the last ones."""
        rounds, status = -1, self.get("/cosched/status")
        while status["rounds"] > rounds:
            rounds = status["rounds"]
            time.sleep(1.5)
            status = self.get("/cosched/status")
        return status

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a user types while the server runs."""
        return subprocess.run(
            [sys.executable, "-m", "cosched.cli", *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while "ready to roll" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-8000:]
            assert time.monotonic() < until, self.log.read_text()[-8000:]
            time.sleep(0.3)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config: str, words: Sequence[str], folder: Path, environment: dict[str, str]) -> Server:
    """Begin to start one on a free port; what it writes goes below ``folder``."""
    port = free_port()
    first = next((i for i, w in enumerate(words) if w.startswith("--")), len(words))
    runs = os.path.relpath(folder / "runs", ROOT)  # as every shipped file has it
    ours = [f"run.dir={runs}", *words[:first]]
    theirs = [*words[first:], "--port", str(port)]
    log = folder / "log"
    line = ["serve", "-c", config, *ours, *theirs]
    process = preforked.start("cosched.cli", line, environment, log, log)
    return Server(process, f"http://127.0.0.1:{port}", log, folder / "runs", environment)


Start = Callable[..., Server]


def until(there: Callable[[], Any]) -> Any:
    """What is there in the end; it may take a while on a busy machine."""
    end = time.monotonic() + PATIENCE
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found
