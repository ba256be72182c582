"""``cosched doctor``: each thing that can be wrong has a message with a remedy."""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cosched import cli, doctor
from tests.helpers.paths import ROOT
from tests.helpers.serving import STATUS


def test_the_doctor_supports_what_the_package_requires() -> None:
    """Two tables that say the same must say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["sglang"]]
    for name, (oldest, below) in doctor.SUPPORTED.items():
        (line,) = [r for r in required if r.startswith(f"{name}>=")]
        below_too = f",<{below}" if below else ""
        assert line == f"{name}>={oldest}{below_too}"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("0.5.20", (0, 5, 20)),
        ("5.8rc1", (5, 8)),
        ("0.5.20.post1", (0, 5, 20)),
    ],
)
def test_versions_are_read(version: str, expected: tuple[int, ...]) -> None:
    """Local builds and release candidates of a supported version are that version."""
    assert doctor.numbers(version) == expected


def test_an_unsupported_version_is_bad_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang's internals move between releases: the first mistake would be far from its cause."""
    found = {"sglang": "0.5.24", "deepspeed": None, "peft": None}
    monkeypatch.setattr(doctor, "version_of", lambda name: found.get(name, "5.9"))
    levels = {finding.text.split()[0]: finding for finding in doctor.packages()}
    assert levels["sglang"].level == "bad"
    assert ">=0.5.20,<0.5.24" in levels["sglang"].text
    assert levels["deepspeed"].level == "bad"
    assert levels["peft"].level == "note"


def test_the_doctor_works_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and what that means; nothing that was asked for fails."""
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda n: None if n == "sglang" else real(n))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "sglang is not installed" in result.output
    assert "cosched run works without it" in result.output


def test_the_doctor_prints_the_command_that_installs_sglang_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang's own requirements are CUDA's, and would replace torch: the file has what a CPU needs,
    exact, and the version that cosched supports."""
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "sglang" else "5.9")
    (text,) = [found.text for found in doctor.packages() if found.text.startswith("sglang ")]
    words = shlex.split(text.splitlines()[-1])
    assert words[:-1] == [sys.executable, "-m", "pip", "install", "--no-deps", "-r"]
    lines = [line for line in Path(words[-1]).read_text().splitlines() if line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    oldest, below = doctor.SUPPORTED["sglang"]
    assert below is not None
    assert doctor.numbers(oldest) <= doctor.numbers(pins["sglang"]) < doctor.numbers(below)
    assert not {"torch", "transformers"} & pins.keys()


SEEN = {
    "entry_points": ["cosched", "cosched_cpu"],
    "algorithms": ["COSCHED_EAGLE3", "COSCHED_PARD"],
    "without_worker": ["COSCHED_PARD"],
    "hooks_missing": [],
}


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, "note", "COSCHED_PARD has no worker"),
        ({"entry_points": []}, "bad", "not installed"),
        ({"algorithms": []}, "bad", "did not take hold"),
        ({"hooks_missing": ["a.b"]}, "bad", "no a.b to hook into"),
    ],
)
def test_what_the_probe_saw_is_judged(change: dict[str, Any], level: str, text: str) -> None:
    """Each way in which SGLang can leave our plugin out has a remedy of its own."""
    findings = list(doctor.judge_plugin({**SEEN, **change}, ""))
    assert any(found.level == level and text in found.text for found in findings)


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, "ok", "version 3, 10 rounds, 4 updates, acceptance length 2.50"),
        ({"acceptance_length": None}, "ok", "nothing drafted yet"),
        ({"failure": "out of memory", "adapting": False}, "bad", "stopped for good: out of memory"),
        ({"warning": "nothing to train on"}, "note", "nothing to train on"),
        ({"adapting": False}, "note", "does not learn"),
    ],
)
def test_a_running_server_is_judged_by_its_status(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], level: str, text: str
) -> None:
    """A server that goes on with a frozen draft looks healthy from outside."""
    answer = {**msgspec.to_builtins(STATUS), **change}
    monkeypatch.setattr(doctor, "call", lambda *_: answer)
    findings = list(doctor.server("http://x", None))
    assert any(found.level == level and text in found.text for found in findings)
    assert any(found.level == "bad" for found in findings) == bool(change.get("failure"))
