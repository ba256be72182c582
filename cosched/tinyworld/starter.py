"""What a folder needs to try everything in: the example experiments, and the tiny world that they name."""

from __future__ import annotations

import shutil
from pathlib import Path

import cosched
from cosched.errors import RunFolderError, TinyWorldError
from cosched.telemetry.run_folder import explained

PARTS = "configs", "tinyworld"
ONLY_IN_A_CLONE = shutil.ignore_patterns("bench")  # suites name scripts of the repository


def write_starter(folder: Path) -> list[Path]:
    """Copy both into ``folder``, where the paths in the experiments are then right.

    Raises:
        RunFolderError: one of them is there already, which is left as it is, or cannot be written.
        TinyWorldError: this installation came without them.
    """
    source, made = _source(), [folder / part for part in PARTS]
    for path in made:
        if path.exists():
            raise RunFolderError(f"{path} is there already; go to another folder, or move it away")
    for path in made:
        with explained(path):
            shutil.copytree(source / path.name, path, ignore=ONLY_IN_A_CLONE)
    return made


def _source() -> Path:
    """Inside the package, where a wheel has them, or beside it in a clone."""
    package = Path(cosched.__file__).parent
    for place in (package / "starter", package.parent):
        if all((place / part).is_dir() for part in PARTS):
            return place
    raise TinyWorldError(
        "this installation has neither example experiments nor the tiny world; a wheel of cosched and "
        "its repository have both"
    )
