"""Going on with an interrupted run: what is kept at every point where no request is running.

``resume/`` holds the newest two states: ``state.json`` and one tensor file for each arm that trains.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec
from safetensors.torch import load_file, save_file

from cosched.engines.embedded.engine import EngineSeconds
from cosched.errors import RunFolderError
from cosched.loop.counters import Counters
from cosched.loop.learner_state import on_host
from cosched.telemetry.metrics import RequestLog, Turn
from cosched.telemetry.run_folder import explained
from cosched.telemetry.saved_states import SavedStates

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from cosched.telemetry.run_folder import RunFolder

FOLDER = "resume"
STATE = "state.json"


class ArmProgress(msgspec.Struct, frozen=True):
    """What has been measured of an arm, and its co-scheduler's counters."""

    logs: list[RequestLog]
    wall_seconds: float
    engine_seconds: EngineSeconds
    counters: Counters | None
    version: int
    turns: list[Turn] = []


class Progress(msgspec.Struct, frozen=True):
    """A run up to its ``groups_done``-th group of requests; ``events_bytes`` of events were kept."""

    groups_done: int
    events_bytes: int
    arms: dict[str, ArmProgress]


def save(
    folder: RunFolder, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Keep the progress; the one kept before stays until this one is whole."""

    def fill(path: Path) -> None:
        (path / STATE).write_bytes(msgspec.json.encode(progress))
        for arm, state in tensors.items():
            save_file(on_host(state), path / f"{arm}.safetensors")

    SavedStates(folder.path / FOLDER).save(fill)


def load(folder: RunFolder) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """The newest progress that is whole, and the tensors of each arm that trains.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = SavedStates(folder.path / FOLDER).newest()
    if path is None:
        raise RunFolderError(
            f"{folder.path} has nothing to resume: no run was interrupted there, or one "
            f"that keeps nothing to go on from (a recording, or engine.kind: sglang)"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    with explained(path, "read"):
        data = (path / STATE).read_bytes()
        for file in path.glob("*.safetensors"):
            tensors[file.stem] = load_file(file)
    try:
        return msgspec.json.decode(data, type=Progress), tensors
    except msgspec.DecodeError as error:
        raise RunFolderError(f"{path / STATE} is damaged: {error}") from error


def forget(folder: RunFolder) -> None:
    """The run is done: there is nothing to go on with."""
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)
