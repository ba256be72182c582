"""Going on with an interrupted run: what is kept at points where no request is running.

``resume/`` holds the newest few states: ``state.json`` and one tensor file for each arm that trains.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec
from safetensors.torch import load_file, save_file

from cosched.engines.embedded.engine import EngineSeconds
from cosched.errors import NOT_DECODED, RunFolderError
from cosched.loop.counters import Counters
from cosched.loop.learner_state import on_host
from cosched.telemetry.metrics import RequestLog, Turn
from cosched.telemetry.run_folder import explained
from cosched.telemetry.saved_states import SavedStates

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from torch import Tensor

    from cosched.telemetry.run_folder import RunFolder

    Tensors = Mapping[str, Mapping[str, Tensor]]
    """Of each arm that trains, by its name."""

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


class RunOrigin(msgspec.Struct, frozen=True):
    """Checksums of what the settings only name: the target, the text, and by arm the draft as loaded."""

    target: str
    text: str
    drafts: dict[str, str]


class Progress(msgspec.Struct, frozen=True):
    """A run up to its ``groups_done``-th group of requests; ``events_bytes`` of events were kept."""

    groups_done: int
    events_bytes: int
    arms: dict[str, ArmProgress]
    origin: RunOrigin


def states_of(folder: RunFolder, keep: int = 2) -> SavedStates:
    """What a run has saved to be gone on from."""
    return SavedStates(folder.path / FOLDER, keep)


def save(states: SavedStates, progress: Progress, tensors: Tensors) -> None:
    """Keep the progress; those kept before stay until this one is whole.

    Raises:
        RunFolderError: the disk refuses.
    """

    def fill(path: Path) -> None:
        (path / STATE).write_bytes(msgspec.json.encode(progress))
        for arm, state in tensors.items():
            save_file(on_host(state), path / f"{arm}.safetensors")

    states.save(fill)


def load(folder: RunFolder) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """The newest progress that is whole, and the tensors of each arm that trains.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = states_of(folder).newest()
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
    except NOT_DECODED as error:
        raise RunFolderError(f"{path / STATE} is damaged: {error}") from error


def check_same(
    progress: Progress, now: RunOrigin, arms: AbstractSet[str], folder: RunFolder
) -> None:
    """Make sure that files have not changed under a run: half of its figures would be of others.

    Raises:
        RunFolderError: one has; the message has the key that names it.
    """
    was = progress.origin
    if progress.arms.keys() != arms:
        raise RunFolderError(
            f"the run in {folder.path} had the arms {', '.join(progress.arms)}, and not these"
        )
    compared = [("target.path", was.target, now.target), ("workload", was.text, now.text)]
    compared += [
        (f"the draft of {arm}", was.drafts.get(arm, ""), now.drafts.get(arm, ""))
        for arm in sorted(was.drafts.keys() | now.drafts.keys())
    ]
    for what, old, new in compared:
        if old != new:
            raise RunFolderError(
                f"{what}: the run in {folder.path} began with other contents (checksum {old}) than "
                f"are there now ({new}); put those back, or begin anew with --overwrite"
            )


def forget(folder: RunFolder) -> None:
    """The run is done: there is nothing to go on with."""
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)
