"""What a draft has in common with its target, bit by bit: whole matrices, or some of their rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lender:
    """The target's tensors, read one at a time from the safetensors files of a folder."""

    folder: Path
    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> Lender:
        """Raises CheckpointError where the folder has no safetensors file or a damaged one."""
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _reading(path) as opened:
                files |= dict.fromkeys(opened.keys(), path)
        if not files:
            raise CheckpointError(f"no target in {folder}: it has no *.safetensors")
        return cls(folder, files)

    def matching(self, like: Tensor) -> list[str]:
        """Names of matrices as wide as that one and no shorter."""
        names: list[str] = []
        for name, path in self.files.items():
            with _reading(path) as opened:
                shape = opened.get_slice(name).get_shape()
            if len(shape) == 2 and shape[1] == like.shape[1] and shape[0] >= like.shape[0]:
                names.append(name)
        return names

    def tensor(self, name: str, draft: Path) -> Tensor:
        """Raises CheckpointError where the target has no such tensor."""
        if name not in self.files:
            raise CheckpointError(f"{draft} borrows {name}, and the target {self.folder} has none")
        with _reading(self.files[name]) as opened:
            return opened.get_tensor(name)


def _reading(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def sha256_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as a safetensors file holds them."""
    return hashlib.sha256(_bits(tensor).numpy().tobytes()).hexdigest()


def borrowed(
    tensor: Tensor, tensors: Mapping[str, Tensor], lender: Lender, draft: Path
) -> tuple[str, str | None, bool] | None:
    """Where the target has the same bits: its tensor, the draft's map of rows, how that is read."""
    for source in lender.matching(tensor):
        lent = lender.tensor(source, draft)
        if lent.dtype != tensor.dtype:
            continue
        if lent.shape == tensor.shape and _same_bits(lent, tensor):
            return source, None, False
        for name, rows in tensors.items():
            if rows.ndim != 1 or rows.dtype != torch.int64 or len(rows) != len(tensor):
                continue
            for offsets in (False, True):
                ids_R = row_ids(rows, offsets)
                if in_range(ids_R, lent) and _same_bits(lent[ids_R], tensor):
                    return source, name, offsets
    return None


def row_ids(rows_R: Tensor, offsets: bool) -> Tensor:
    """The target's rows that a draft's map names: as they are, or as offsets from its own rows."""
    return rows_R + torch.arange(len(rows_R)) if offsets else rows_R


def in_range(ids_R: Tensor, lent: Tensor) -> bool:
    """Whether the target's matrix has all of these rows."""
    return bool(((ids_R >= 0) & (ids_R < len(lent))).all())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
