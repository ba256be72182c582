"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from typing import TYPE_CHECKING

from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``path``, and give it that name when it is done.

    Each writer has a folder of its own, so that none takes another's for its own leftovers. What
    fails leaves nothing.

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
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
