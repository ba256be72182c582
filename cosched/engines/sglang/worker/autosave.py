"""What a draft has learnt outlives its process: saved now and then, and when the server ends."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from cosched.errors import CoschedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("cosched")


class Autosave:
    """Saves the draft that serves into ``folder``, as ``auto-VERSION``, and keeps the newest ``keep``.

    ``every`` is a number of publications, 0 for never; ``at_end`` saves when the server ends. What
    cannot be saved is said in the log, and stops nothing. Others' folders are left alone.
    """

    def __init__(
        self, folder: Path, save: Callable[[Path], None], every: int, at_end: bool, keep: int
    ) -> None:
        self._folder = folder
        self._save = save
        self._every = every
        self._at_end = at_end
        self._keep = keep
        self._tried = self._stored = 0  # versions
        self._saved: list[Path] = []

    def look(self, version: int) -> None:
        """After a round: requests wait while it saves."""
        if self._every and version - self._tried >= self._every:
            self._store(version)

    def end(self, version: int) -> None:
        """When the last request is answered."""
        if self._at_end and version > self._stored:
            self._store(version)

    def _store(self, version: int) -> None:
        self._tried = version  # what fails is tried again so many later, and at the end
        path = self._folder / f"auto-{version}"
        try:
            self._save(path)
        except CoschedError as error:
            logger.warning("cosched: version %d of the draft is not saved: %s", version, error)
            return
        logger.info("cosched: version %d of the draft is in %s", version, path)
        self._stored = version
        self._saved.append(path)
        while len(self._saved) > self._keep:
            shutil.rmtree(self._saved.pop(0), ignore_errors=True)
