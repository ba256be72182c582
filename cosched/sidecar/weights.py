"""A version's weights as bytes, tensor behind tensor, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from cosched.loop.copies import starts_of
from cosched.sidecar.messages import Part
from cosched.sidecar.rows import TYPES
from cosched.sidecar.wire import FrameError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


def pack_weights(weights: Mapping[str, Tensor]) -> tuple[tuple[Part, ...], Tensor]:
    """What they are, and a copy of their bytes in the host's memory."""
    parts = tuple(
        Part(name, tuple(weight.shape), str(weight.dtype).removeprefix("torch."))
        for name, weight in weights.items()
    )
    *starts, size = _starts(parts)
    bytes_ = torch.empty(size, dtype=torch.uint8)
    for view, weight in zip(_views(parts, starts, bytes_), weights.values(), strict=True):
        view.copy_(weight)  # host waits for the device
    return parts, bytes_


def unpack_weights(
    parts: Iterable[Part], bytes_: Tensor, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights, over the bytes themselves; ``known`` are tensors that the draft has, by their names.

    Raises:
        FrameError: one is none of those, of another shape or type, or the bytes are not theirs.
    """
    parts = tuple(parts)
    for part in parts:
        own = known.get(part.name)
        if own is None or tuple(own.shape) != part.shape or TYPES.get(part.dtype) != own.dtype:
            raise FrameError(f"weights of {part.name} that this draft has not")
    if len({part.name for part in parts}) != len(parts):
        raise FrameError("the same weights twice")
    *starts, size = _starts(parts)
    if size != len(bytes_):
        raise FrameError(f"{len(bytes_)} bytes of weights, and by the header {size}")
    views = _views(parts, starts, bytes_)
    return {part.name: view for part, view in zip(parts, views, strict=True)}


def _starts(parts: tuple[Part, ...]) -> list[int]:
    """Of each, and the end of the last."""
    return starts_of(math.prod(part.shape) * TYPES[part.dtype].itemsize for part in parts)


def _views(parts: tuple[Part, ...], starts: list[int], bytes_: Tensor) -> list[Tensor]:
    return [
        bytes_[start : start + math.prod(part.shape) * TYPES[part.dtype].itemsize]
        .view(TYPES[part.dtype])
        .view(part.shape)
        for part, start in zip(parts, starts, strict=True)
    ]


def bytes_of(weights: Mapping[str, Tensor]) -> int:
    """Most bytes that all of them take as a message."""
    return starts_of(weight.nbytes for weight in weights.values())[-1]
