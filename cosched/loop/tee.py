"""One sink in the place of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosched.loop.roles import Sink


class Tee:
    """Passes each event on to all of them, in their order."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def emit(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.emit(kind, **fields)
