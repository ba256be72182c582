"""An experiment's file, and what its run left."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from cosched.settings.schema import Config
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.cli import run_cli


def write(tmp_path: Path, settings: dict) -> Path:
    """The file of an experiment."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def new_folder(config: Config) -> RunFolder:
    folder = RunFolder(config.run_folder)
    folder.create()
    return folder


def events_of(folder: Path) -> list[str]:
    """The lines of its event log."""
    return (folder / "events.jsonl").read_text().splitlines()


def rounds_of(folder: Path, arm: str) -> list[tuple]:
    """Each round of an arm, without the order in which requests took turns."""
    events = [json.loads(line) for line in events_of(folder)]
    return sorted(
        tuple(e["row"].values()) for e in events if e["kind"] == "round" and e["arm"] == arm
    )


def turns_of(folder: Path) -> list[dict]:
    """Which arm decoded when, and for how long."""
    events = [json.loads(line) for line in events_of(folder)]
    return [e["turn"] | {"arm": e["arm"]} for e in events if e["kind"] == "turn"]


def run_without_updates(tmp_path: Path, settings: dict) -> tuple[Path, dict]:
    """Run a drafter that learns by itself: texts are plain's, and ``adapted`` is ``frozen``, round by round.

    Returns the run folder and the figures of its arms.
    """
    code, out, err = run_cli("run", "-c", write(tmp_path, settings))
    assert code == 0, out + err
    folder = tmp_path / "runs" / "one"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert {arm["lossless_mismatches"] for arm in arms.values()} == {0}
    assert arms["adapted"]["updates"] == arms["adapted"]["versions"] == 0
    assert rounds_of(folder, "adapted") == rounds_of(folder, "frozen")
    return folder, arms
