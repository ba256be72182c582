"""Checksums of weights, folded where they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

PRIME = 2654435761  # near 2^32 over the golden ratio: neighbours are far apart


@dataclass(frozen=True, slots=True)
class Folded:
    """What a checksum is made of, still on its device: what each tensor is, and its folds in bytes.

    It is of the tensors as they were: to write to them changes nothing in it.
    """

    names: tuple[str, ...]
    bytes_: tuple[Tensor, ...]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """64-bit checksum of names, shapes, dtypes and every bit of the values, in hexadecimal.

    Each row of a tensor is folded on its device; the folds are hashed in order on the host, so a
    changed bit shows, and so does a row in the wrong place.
    """
    return read(fold(tensors))[0]


def fold(tensors: Mapping[str, Tensor]) -> Folded:
    """All that the device does for a checksum; nobody waits for it."""
    return Folded(_names(tensors), tuple(map(_folded_bytes, tensors.values())))


def _names(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What each tensor is, but for its values."""
    return tuple(f"{name} {one.dtype} {list(one.shape)}" for name, one in tensors.items())


def fold_together(tensors: Mapping[str, Tensor]) -> Folded:
    """Likewise, but all folds are summed on the device, so that the host has next to nothing to hash.

    Each is multiplied by an odd number of its own, modulo 2^64: no change of one is lost, and two that
    change places show (of numbers of up to 32 bits, always).
    """
    each: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        each.setdefault(tensor.device, []).append(_rows_folded(tensor).flatten().to(torch.int64))
    numbers: list[Tensor] = []
    for device, folds in each.items():
        whole = torch.cat(folds)
        factors = torch.arange(len(whole), device=device) * (2 * PRIME) + 1
        numbers.append((whole * factors).sum().view(1).view(torch.uint8))
    names = "".join(_names(tensors))
    return Folded(tuple(f"{names}{place}" for place in range(len(numbers))), tuple(numbers))


def sliced(tensors: Mapping[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """All rows of the tensors in so many parts, each of about as many bytes; some may have none."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(number)]
    share = max(1, -(-sum(tensor.nbytes for tensor in tensors.values()) // number))
    begin = 0  # of the tensor, if all lay one behind the other
    for name, tensor in tensors.items():
        rows = tensor if tensor.ndim else tensor.view(1)
        size = tensor.nbytes // max(1, len(rows))
        for part in range(begin // share, number) if size else ():
            # A row goes to the part that its first byte lies in.
            first, end = (
                max(0, -(-(cut - begin) // size)) for cut in (part * share, (part + 1) * share)
            )
            if first >= len(rows):
                break
            if first < end:
                parts[part][f"{name} from {first}"] = rows[first:end]
        begin += tensor.nbytes
    return parts


def read(*several: Folded) -> list[str]:
    """The checksum of each; the host gets all that lie on one device at once."""
    found = iter(_to_host([tensor for one in several for tensor in one.bytes_]))
    checksums: list[str] = []
    for one in several:
        digest = hashlib.sha256()
        for name in one.names:
            digest.update(name.encode())
            digest.update(next(found).tobytes())
        checksums.append(digest.hexdigest()[:16])
    return checksums


def _folded_bytes(tensor: Tensor) -> Tensor:
    """The folds of its rows, or the values where it has none, as bytes ``[B]``."""
    return _rows_folded(tensor).contiguous().flatten().view(torch.uint8)


def _rows_folded(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    return _folds(bits) if bits.ndim > 1 else bits.clone()


def _to_host(tensors: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
    """Bytes, of all tensors of a device in one copy."""
    found: dict[int, NDArray[np.uint8]] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        whole = torch.cat([tensors[place] for place in here])
        if device.type != "cpu":
            whole = whole.cpu()  # host waits for the device
        ends = np.cumsum([len(tensors[place]) for place in here])
        found |= dict(zip(here, np.split(whole.numpy(), ends[:-1]), strict=True))
    return [found[place] for place in range(len(tensors))]


def _folds(bits: Tensor) -> Tensor:
    """All numbers of each row, folded by exclusive or, as 64-bit numbers ``[...]``."""
    if bits.device.type != "cpu":
        return torch.hash_tensor(bits, dim=-1)
    folds = np.bitwise_xor.reduce(bits.numpy(), axis=-1)  # the same, several times as fast
    return torch.from_numpy(np.asarray(folds)).to(torch.int64)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
