"""Reading and writing draft checkpoints: all tensors accounted for, or a table of what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no file, or not JSON.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint folder at {directory}")
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder: ``*.safetensors``, or ``pytorch_model.bin`` without unpickling code.

    Raises:
        CheckpointError: no weights, or a damaged file.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{directory} has neither *.safetensors nor pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def check_tensors(
    expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], directory: Path
) -> None:
    """Refuse missing, unknown and misshapen tensors, with one line for each.

    Raises:
        CheckpointError: any name or shape differs.
    """
    problems = [
        f"  {name}: expected {list(shape)}, "
        + (f"found {list(found[name].shape)}" if name in found else "missing")
        for name, shape in expected.items()
        if name not in found or found[name].shape != shape
    ]
    problems += [
        f"  {name}: not a tensor of this drafter, found {list(tensor.shape)}"
        for name, tensor in found.items()
        if name not in expected
    ]
    if problems:
        raise CheckpointError(
            f"the tensors of {directory} do not fit:\n" + "\n".join(sorted(problems))
        )


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
