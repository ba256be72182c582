"""Going on with an interrupted run: what is kept at every point where no request is running.

``resume/`` holds ``state.json`` and one tensor file for each arm that trains. The state names the
tensor files it belongs to and is replaced last, so a reader finds a whole state or none.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec
from safetensors.torch import load_file, save_file

from cosched.engines.embedded.engine import EngineSeconds
from cosched.errors import RunFolderError
from cosched.loop.counters import Totals
from cosched.telemetry.metrics import RequestLog, Turn
from cosched.telemetry.run_folder import RunFolder, explained

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FOLDER = "resume"
STATE = f"{FOLDER}/state.json"


class ArmProgress(msgspec.Struct, frozen=True):
    """What has been measured of an arm, and its co-scheduler's counters."""

    logs: list[RequestLog]
    wall_seconds: float
    engine_seconds: EngineSeconds
    totals: Totals | None
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
    """Keep the progress; the one kept before stays readable until this one is whole."""
    directory = folder.path / FOLDER
    with explained(directory):
        directory.mkdir(exist_ok=True)
        for arm, state in tensors.items():
            contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(contiguous, directory / f"{progress.groups_done}-{arm}.safetensors")
    folder.write(STATE, msgspec.json.encode(progress))
    with explained(directory):
        for old in directory.glob("*.safetensors"):
            if not old.name.startswith(f"{progress.groups_done}-"):
                old.unlink()


def load(folder: RunFolder) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """The kept progress, and the tensors of each arm that trains.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = folder.path / STATE
    if not path.exists():
        raise RunFolderError(
            f"{folder.path} has nothing to resume: no run was interrupted there, or one "
            f"that keeps nothing to go on from (a recording, or engine.kind: sglang)"
        )
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=Progress)
    except msgspec.DecodeError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    tensors = {}
    for arm in progress.arms:
        file = folder.path / FOLDER / f"{progress.groups_done}-{arm}.safetensors"
        with explained(file):
            if file.exists():
                tensors[arm] = load_file(file)
    return progress, tensors


def forget(folder: RunFolder) -> None:
    """The run is done: there is nothing to go on with."""
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)
