"""SIGTERM, as batch systems and containers send it: an end like that of Ctrl-C, which keeps what there is."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def sigterm_interrupts() -> Generator[None]:
    """SIGTERM raises ``KeyboardInterrupt`` in here; only the main thread may ask for it."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
