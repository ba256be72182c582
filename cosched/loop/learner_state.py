"""What a learner goes on from, as files: ``state.json``, a tensor file for each rank, a draft.

The draft is a checkpoint in its public format, for whoever wants to serve what was learnt and no more.
Nothing that is read again is pickled: to read a state runs nothing that somebody put into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from safetensors.torch import load_file, save_file

from cosched.errors import NOT_DECODED, RunFolderError
from cosched.loop.counters import Counters
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

FORM = 1  # of the files
STATE = "state.json"
DRAFT = "draft"

Tensors = dict[str, "Tensor"]


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a state can be gone on from with, and nothing else.

    Checksums of the target and of the draft as loaded, how many ranks train, and the settings of
    learning by their keys.
    """

    target: str
    draft: str
    num_ranks: int
    settings: dict[str, Any]


class LearnerState(msgspec.Struct, frozen=True, kw_only=True):
    """All of a state but its tensors. ``version`` serves; ``trains`` says that a trainer's are there."""

    form: int = FORM
    version: int
    trains: bool
    counters: Counters
    origin: Origin


def on_host(tensors: Mapping[str, Tensor]) -> Tensors:
    """In the host's memory, from where they are written while the device goes on."""
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def write_state(
    path: Path,
    state: bytes,
    tensors: Sequence[Mapping[str, Tensor]],
    save_draft: Callable[[Path], None],
) -> None:
    """Fill a folder: ``state`` is a ``LearnerState`` as JSON, ``tensors`` are each rank's.

    Raises:
        OSError: the disk refuses.
        SafetensorError: the same.
    """
    (path / STATE).write_bytes(state)
    for rank, own in enumerate(tensors):
        save_file(dict(own), _tensor_file(path, rank))
    save_draft(path / DRAFT)


def read_state(path: Path) -> LearnerState:
    """The numbers of a state.

    Raises:
        RunFolderError: they cannot be read, or are of another version of cosched.
    """
    file = path / STATE
    with explained(file, "read"):
        data = file.read_bytes()
    try:
        form = msgspec.json.decode(data).get("form")
        if form != FORM:
            raise RunFolderError(f"{file} has the form {form}; this cosched reads {FORM}")
        return msgspec.json.decode(data, type=LearnerState)
    except (*NOT_DECODED, AttributeError) as error:
        raise RunFolderError(f"{file} is not a saved state: {error}") from error


def read_tensors(path: Path, rank: int = 0) -> Tensors:
    """The tensors of a rank: those of all are in rank 0's, its own in a file beside.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    tensors: Tensors = {}
    for file in dict.fromkeys((_tensor_file(path, 0), _tensor_file(path, rank))):
        with explained(file, "read"):
            tensors |= load_file(file)
    return tensors


def taken(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """One tensor of a state, of the shape that it goes into.

    Raises:
        RunFolderError: it is not there, or has another shape or none of its numbers.
    """
    found = tensors.get(name)
    if found is None:
        raise RunFolderError(f"the saved state has no {name}")
    if found.shape != like.shape or found.is_floating_point() != like.is_floating_point():
        raise RunFolderError(
            f"{name} of the saved state is {found.dtype} {list(found.shape)}, and has to be "
            f"{like.dtype} {list(like.shape)}"
        )
    return found


def _tensor_file(path: Path, rank: int) -> Path:
    return path / f"rank{rank}.safetensors"
