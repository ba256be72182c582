"""Start a server whose draft learns, ask it one question, print answer and status, and stop it.

python examples/serve_demo.py -c configs/serve_smollm2_cpu.yaml [key=value …] [--ask TEXT] [--tokens N]

`make serve-demo` runs it where SGLang is installed for a CPU. What it asks, any OpenAI client asks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from collections.abc import Generator

COSCHED = [sys.executable, "-m", "cosched.cli"]
PATIENCE = 600  # seconds for a start: a busy laptop imports SGLang for minutes
QUESTION = "Write a Python function that tells whether a text is a palindrome, and explain it."


class NoServerError(RuntimeError):
    """It did not come up; the message is its last words."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(config: str, overrides: list[str]) -> Generator[str]:
    """The address of a server that answers; it is gone when the block is left, however it is left."""
    port = free_port()
    words = ["serve", "-c", config, *overrides, "--port", str(port), "--log-level", "error"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*COSCHED, *words], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not answers(url, process):
                log.seek(0)
                raise NoServerError(log.read().decode(errors="replace")[-4000:])
            yield url
        finally:
            stop(process)


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether it comes up: False where it has ended instead, or takes for ever."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return True
        except OSError:  # not yet; an HTTP error is one, too
            time.sleep(0.5)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """As a supervisor does: SIGTERM, and what is left after a minute is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, question: str, num_tokens: int) -> None:
    """Print the answer as it comes."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE) as client:
        model = client.models.list().data[0].id
        pieces = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
        )
        for piece in pieces:
            for choice in piece.choices:
                print(choice.delta.content or "", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="configs/serve_smollm2_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the file")
    parser.add_argument("--ask", default=QUESTION, metavar="TEXT")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="of the answer, at most"
    )
    given = parser.parse_args()
    print(
        f"starting SGLang with {Path(given.config)} (half a minute to some minutes) …", flush=True
    )
    try:
        with server(given.config, given.overrides) as url:
            print(f"\n> {given.ask}\n")
            ask(url, given.ask, given.tokens)
            print("\ncosched control status:", flush=True)
            subprocess.run([*COSCHED, "control", "status", "--url", url], check=True)
    except NoServerError as error:
        sys.exit(f"{error}\nthe server did not come up; these were its last words")
    print("\nthe server has stopped")


if __name__ == "__main__":
    main()
