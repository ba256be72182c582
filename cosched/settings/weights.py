"""Weights on disk, judged by the headers of their files: nothing of them is loaded.

A safetensors file is eight bytes with the length of a JSON header, the header, and the data, whose
parts the header names by ``data_offsets`` (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

PICKLED = "pytorch_model*.bin"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, by their names; its own notes are left out.

    Raises:
        CheckpointError: it has no such header, or is shorter or longer than the header says.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            raw = file.read(min(length, LONGEST_HEADER))
            entries = {n: e for n, e in json.loads(raw).items() if n != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is empty, cut off, or no safetensors file") from error
    if not ends:
        raise CheckpointError(f"{path} has no tensors")
    if (whole := 8 + length + max(ends)) != size:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, and by its header {whole:,}; fetch it again"
        )
    return entries


def check_weights(key: str, folder: Path, pickles: bool) -> None:
    """Make sure that the weights of a model are there and whole; ``key`` says where it is named.

    ``pickles`` says whether whoever loads it reads ``pytorch_model.bin`` too, as Hugging Face names it.

    Raises:
        CheckpointError: they are not.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files and not (pickles and any(folder.glob(PICKLED))):
        others = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)]
        has = f"only {', '.join(others)}, which are not opened" if others else "none"
        if any(folder.glob(PICKLED)) and not key.startswith("target"):
            has += "; cosched convert writes a draft anew"
        raise CheckpointError(f"{key}: {folder} needs weights in *.safetensors, and has {has}")
    try:
        for path in files:
            header(path)
        missing = _named_by_index(folder) - {path.name for path in files}
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if missing:
        raise CheckpointError(f"{key}: {folder} lacks {min(missing)}, which its {INDEX} names")


def _named_by_index(folder: Path) -> set[str]:
    """Files that a checkpoint in several parts consists of."""
    path = folder / INDEX
    if not path.is_file():
        return set()
    try:
        return set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
