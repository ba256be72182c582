"""A thread that trackers write in: no round waits for a disk or a network, and none ends of one."""

from __future__ import annotations

import logging
import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger("cosched")

MOST_WAITING = 256  # points; what comes behind them is left out
PATIENCE_S = 10.0  # that an end waits for what is to be written yet

T = TypeVar("T")


class Tracker(Protocol):
    """Draws numbers by their names, at a step that does not fall. It may raise whatever it likes."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


class Trackers:
    """Hands what is to be drawn to trackers, by their names.

    They are opened here, before anything is decoded, and write in a thread. One that raises is let go, which
    is said once; of one that hangs what does not fit into the queue is left out, and an end waits for it
    ``patience_s`` at most.
    """

    def __init__(
        self, openers: Mapping[str, Callable[[], Tracker]], patience_s: float = PATIENCE_S
    ) -> None:
        self.write_seconds = 0.0  # of the newest point
        self._patience_s = patience_s
        self._late = False
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._open: dict[str, Tracker] = {}
        for name, opener in openers.items():
            if (tracker := self._attempt(name, opener)) is not None:
                self._open[name] = tracker
        self._thread = threading.Thread(target=self._work, name="cosched-trackers", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Have it drawn; never waits."""
        try:
            self._queue.put_nowait((step, scalars))
        except queue.Full:
            if not self._late:
                logger.warning("cosched leaves out points that %s takes too long for", self._names)
            self._late = True

    def close(self) -> None:
        """Wait a while for what is to be written yet; a thread that hangs ends with the process."""
        try:
            self._queue.put(None, timeout=self._patience_s)
        except queue.Full:
            return
        self._thread.join(self._patience_s)

    @property
    def _names(self) -> str:
        return ", ".join(self._open)

    def _work(self) -> None:
        while (point := self._queue.get()) is not None:
            started = time.perf_counter()
            for name, tracker in list(self._open.items()):
                self._attempt(name, partial(tracker.write, *point))
            self.write_seconds = time.perf_counter() - started
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, do: Callable[[], T]) -> T | None:
        try:
            return do()
        except Exception:
            self._open.pop(name, None)
            logger.warning("cosched draws nothing more with %s", name, exc_info=True)
            return None
