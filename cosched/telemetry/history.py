"""What a served draft went through: ``events.jsonl`` in the folder of a start, bounded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import EventLog, explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("cosched")

LIMIT = 1 << 26  # bytes of one file


class History:
    """Takes events with the time of day, in seconds since 1970, of ``clock``.

    A server runs for months: the file ``NAME.jsonl`` becomes ``NAME.1.jsonl`` when it has ``limit`` bytes,
    in the place of the one before it. One that is ``private`` can be read by its user alone. What cannot be written stops neither serving nor learning: it is said
    once, and there is no history from then on.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float], limit: int = LIMIT, private: bool = False
    ) -> None:
        self._path = path
        self._clock = clock
        self._limit = limit
        self._private = private
        self._log: EventLog | None = None
        self._attempt(self._open)

    def emit(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._attempt(lambda: self._write(kind, fields))

    def close(self) -> None:
        """No event comes any more."""
        if self._log is not None:
            self._attempt(self._log.close)

    def _open(self) -> None:
        self._log = EventLog()
        with explained(self._path):
            if self._private:
                self._path.touch(mode=0o600)
            size = self._path.stat().st_size if self._path.exists() else 0
        self._log.open(self._path, keep_bytes=size, buffered=False)

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        assert self._log is not None
        self._log.emit(kind, time=self._clock(), **fields)
        if self._log.flush() >= self._limit:
            self._log.close()
            with explained(self._path):
                self._path.replace(self._path.with_suffix(f".1{self._path.suffix}"))
            self._open()

    def _attempt(self, do: Callable[[], None]) -> None:
        try:
            do()
        except RunFolderError as error:
            self._log = None
            logger.warning("cosched writes %s no more: %s", self._path.name, error)
