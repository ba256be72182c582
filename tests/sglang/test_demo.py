"""``examples/serve_demo.py``, which ``make serve-demo`` runs, with the tiny world in the real model's place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.leftovers import left, mark
from tests.sglang.serving import ROOT

pytestmark = pytest.mark.sglang


def demo(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/serve_demo.py", "-c", "configs/serve_tiny_cpu.yaml", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def environment(bare_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ours = {"TMPDIR": str(temporary), "COSCHED_TEST_SPAWN": "1"}
    return {**bare_environment, **mark(str(tmp_path)), **ours}


def test_it_answers_says_how_it_stands_and_is_gone(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """One question to a server that learns, and nothing of it is left running."""
    words = [f"run.dir={tmp_path}", "adapt.policy.rounds=4", "--ask", "Write a function."]
    shown = demo(environment, *words, "--tokens", "64")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    _, answer = shown.stdout.split("> Write a function.")
    answer, status = answer.split("cosched control status:")
    assert answer.strip()
    updates = re.search(r"updates +(\d+)", status)
    assert updates is not None
    assert int(updates[1]) > 0
    assert "failure                   None" in status
    assert left(str(tmp_path), tmp_path / "tmp", set()) == []


def test_a_server_that_does_not_come_up_is_shown_to_say_why(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Its own last words, and no success."""
    shown = demo(environment, f"run.dir={tmp_path}", "target.path=nowhere")
    assert shown.returncode == 1
    assert "target.path" in shown.stderr
    assert "nowhere" in shown.stderr
    assert left(str(tmp_path), tmp_path / "tmp", set()) == []
