"""What is wrong just now, and goes on in spite of it: told once, and not at every look."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosched.loop.roles import Sink

logger = logging.getLogger("cosched")


class StandingWarning:
    """The ``text`` of it; None while all is well. The log and a sink hear when it begins or changes."""

    def __init__(self, sink: Sink) -> None:
        self.text: str | None = None
        self._sink = sink

    def becomes(self, text: str | None) -> bool:
        """Whether it is another one than before."""
        if text == self.text:
            return False
        self.text = text
        if text:
            logger.warning("cosched: %s", text)
            self._sink.emit("warning", reason=text)
        return True
