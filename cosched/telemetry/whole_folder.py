"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None], durable: bool = False) -> None:
    """Let ``write`` fill a folder beside ``path``, and give it that name when it is done.

    Each writer has a folder of its own, so that none takes another's for its own leftovers. What
    fails leaves nothing. What is ``durable`` is on the disk before it has its name, and its name is
    when this returns: it survives the machine's end too.

    Raises:
        RunFolderError: ``path`` is there and not empty, or the disk refuses.
    """
    with explained(path):
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken:
        raise RunFolderError(f"{path} exists and is not empty; name a new folder")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with explained(path):
            write(partial)
            if durable:
                _sync_all(partial)
            partial.rename(path)
            if durable:
                sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until what is in a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
