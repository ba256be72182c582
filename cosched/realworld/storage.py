"""A compact way to keep a draft: eight bits a weight, and nothing that the target has as well.

A compact folder holds ``compact.safetensors`` and ``compact.json``; every other file is the draft's
own (``config.json``, its card), as it was. For each tensor of the draft the JSON says its dtype, its
shape, the SHA-256 of its bytes, and how it is kept (``kept``):

``exact``        under its own name.
``int8``         matrices ``[R, C]``: int8 under its own name and float32 ``[R]`` under ``NAME.scale``;
                 the weight is the product of the two, row by row, rounded to bfloat16.
``target``       not at all: it is the target's tensor ``source``, bit by bit.
``target_rows``  not at all: it is those rows of the target's tensor ``source`` that the draft's own
                 tensor ``rows`` names. With ``offsets``, row i is ``i + rows[i]``.

A scale is a row's greatest magnitude over 127, so a weight is off by half a scale at most before it
is rounded to bfloat16. That greatest magnitude is a bfloat16 itself and survives, and the rounding
moves no weight by half a scale: packing what was expanded gives the same integers and scales.

Letters: R rows, C columns.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cosched.errors import CheckpointError
from cosched.realworld.borrowing import Lender, borrowed, in_range, row_ids, sha256_of_tensor
from cosched.realworld.folders import SUMS, new_folder, sealed_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "model.safetensors"
COMPACT = "compact.safetensors"
MANIFEST = "compact.json"
STEPS = 127  # on each side of zero; -128 stays unused, so that signs are treated alike


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one tensor of the draft is kept; the module's docstring has the meaning."""

    kept: Literal["exact", "int8", "target", "target_rows"]
    dtype: str
    shape: list[int]
    sha256: str
    source: str | None = None
    rows: str | None = None
    offsets: bool = False


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``compact.json``."""

    format: Literal["cosched-compact-1"]
    tensors: dict[str, Kept]


def pack(draft: Path, destination: Path, target: Path) -> Manifest:
    """Write the compact form of a bfloat16 draft of that target; it appears whole or not at all.

    Raises:
        CheckpointError: a folder is damaged, or a matrix is of another dtype or not finite.
        RealWorldError: the destination cannot be written.
    """
    tensors, lender = _load(draft / WEIGHTS), Lender.of(target)
    parts: dict[str, Tensor] = {}
    entries: dict[str, Kept] = {}
    for name, tensor in tensors.items():
        entries[name], own = _keep(name, tensor, tensors, lender, draft)
        parts |= own
    manifest = Manifest("cosched-compact-1", entries)
    with new_folder(destination) as folder:
        _copy_companions(draft, folder)
        save_file(parts, folder / COMPACT)
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        (folder / MANIFEST).write_bytes(text + b"\n")
    return manifest


def expand(
    compact: Path,
    destination: Path,
    target: Path,
    same_target: bool = True,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the draft in full, in the public format that it was packed from.

    Every tensor's SHA-256 is compared. Without ``same_target`` what is borrowed may be other
    weights of the same shape: such a draft works, but is not the one that was measured. ``notes``
    are files to write beside.

    Raises:
        CheckpointError: the compact folder is damaged, or the target is not the one it was made for.
        RealWorldError: the destination cannot be written.
    """
    try:
        manifest = msgspec.json.decode((compact / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{compact / MANIFEST} cannot be read: {error}") from error
    parts, lender = _load(compact / COMPACT), Lender.of(target)
    tensors: dict[str, Tensor] = {}
    for name, entry in manifest.tensors.items():
        tensor = _restore(name, entry, parts, lender, compact)
        lent = entry.source is not None
        if sha256_of_tensor(tensor) != entry.sha256 and (same_target or not lent):
            whose = f"the target {target} is not the one it was made for" if lent else "damaged"
            raise CheckpointError(f"{compact}: {name} is not what was packed ({whose})")
        tensors[name] = tensor
    with sealed_folder(destination) as folder:
        _copy_companions(compact, folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        for name, text in (notes or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _copy_companions(source: Path, destination: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in {WEIGHTS, COMPACT, MANIFEST, SUMS}:
            shutil.copyfile(path, destination / path.name)


def _keep(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], lender: Lender, draft: Path
) -> tuple[Kept, dict[str, Tensor]]:
    """The entry of a tensor, and what has to be stored for it."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    if tensor.ndim != 2:
        return Kept("exact", dtype, shape, sha256_of_tensor(tensor)), {name: tensor}
    if lent := borrowed(tensor, tensors, lender, draft):
        source, rows, offsets = lent
        kept: Literal["target", "target_rows"] = "target_rows" if rows else "target"
        return Kept(kept, dtype, shape, sha256_of_tensor(tensor), source, rows, offsets), {}
    if tensor.dtype != torch.bfloat16 or not tensor.isfinite().all():
        was = dtype if tensor.dtype != torch.bfloat16 else "not finite"
        raise CheckpointError(f"{draft}: {name} is {was}; matrices to pack are finite bfloat16")
    values_RC, scales_R = quantise(tensor)
    entry = Kept("int8", dtype, shape, sha256_of_tensor(dequantise(values_RC, scales_R)))
    return entry, {name: values_RC, f"{name}.scale": scales_R}


def _restore(
    name: str, entry: Kept, parts: Mapping[str, Tensor], lender: Lender, compact: Path
) -> Tensor:
    """A tensor of the draft, as the draft's loader is to find it."""
    needed = {"exact": [name], "int8": [name, f"{name}.scale"], "target": []}
    for part in needed.get(entry.kept, [entry.rows or ""]):
        if part not in parts:
            raise CheckpointError(f"{compact / COMPACT} has no {part}")
    if entry.kept == "exact":
        return parts[name]
    if entry.kept == "int8":
        return dequantise(parts[name], parts[f"{name}.scale"])
    lent = lender.tensor(entry.source or "", compact)
    if entry.rows is not None:
        ids_R = row_ids(parts[entry.rows], entry.offsets)
        if not in_range(ids_R, lent):
            raise CheckpointError(f"{compact}: {name} borrows rows that {entry.source} has not")
        lent = lent[ids_R]
    if list(lent.shape) != entry.shape:
        raise CheckpointError(
            f"{compact}: {name} is {entry.shape} and borrows {entry.source}, which is "
            f"{list(lent.shape)} in the target {lender.folder}"
        )
    return lent.to(getattr(torch, entry.dtype))


def quantise(weights_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to the nearest of 255 multiples of its scale: int8 ``[R, C]``, float32 ``[R]``."""
    wide_RC = weights_RC.float()
    scales_R = wide_RC.abs().amax(1) / STEPS
    steps_R1 = torch.where(scales_R > 0, scales_R, 1.0)[:, None]  # of a row of zeros
    return (wide_RC / steps_R1).round().clamp(-STEPS, STEPS).to(torch.int8), scales_R


def dequantise(values_RC: Tensor, scales_R: Tensor) -> Tensor:
    """The weights ``[R, C]`` in bfloat16."""
    return (values_RC.float() * scales_R[:, None]).to(torch.bfloat16)
