"""Memory of a server's rows, which a trainer on the same machine maps: nothing is copied between them.

It is a file without a name (``memfd_create``), which ends with the last process that has it, so that a
killed one leaves nothing behind. Its length is sealed: whoever maps it cannot be hurt by a shorter one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosched.sidecar.messages import Memory
from cosched.sidecar.wire import FrameError

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "cosched-rows-"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ALIGNMENT = 4096  # of a slot


class Slots:
    """``count`` pieces of ``slot_bytes``; pages that were never written to take no memory."""

    def __init__(self, name: str, count: int, slot_bytes: int) -> None:
        slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self._descriptor = os.memfd_create(PREFIX + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, count * slot_bytes)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        self.memory = Memory(os.getpid(), self._descriptor, name, count, slot_bytes)
        self.tensors = _slots(self._descriptor, self.memory)

    def __del__(self) -> None:
        os.close(self._descriptor)


def mapped(memory: Memory, most_bytes: int) -> list[Tensor] | None:
    """The slots of a server's memory, bytes each; None where that process is not on this machine.

    Raises:
        FrameError: it is not what it is said to be, or larger than ``most_bytes``.
    """
    if memory.slots * memory.slot_bytes > most_bytes:
        raise FrameError("more shared memory than a server has with these settings")
    path = Path(f"/proc/{memory.pid}/fd/{memory.descriptor}")
    try:
        if not str(path.readlink()).startswith(f"/memfd:{PREFIX}{memory.name} "):
            return None  # another machine's process of that number
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        sealed = stat.S_ISREG(found.st_mode) and fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS
        if sealed != SEALS or found.st_size != memory.slots * memory.slot_bytes:
            raise FrameError("shared memory that is not sealed at the size it is said to have")
        return _slots(descriptor, memory)
    finally:
        os.close(descriptor)


def _slots(descriptor: int, memory: Memory) -> list[Tensor]:
    shared = mmap.mmap(descriptor, memory.slots * memory.slot_bytes)
    whole = torch.frombuffer(shared, dtype=torch.uint8)
    return list(whole.split(memory.slot_bytes))
