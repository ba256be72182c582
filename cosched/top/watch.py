"""The loop of ``cosched top``: look, show, wait."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cosched.errors import CoschedError
from cosched.top.frame import frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    from cosched.top.sources import Source

LENGTHS_KEPT = 32  # of the line of lengths


def watch(
    source: Source, console: Console, interval: float, sleep: Callable[[float], None], once: bool
) -> None:
    """Show ``source`` until Ctrl-C, or ``once``; a look that fails later is said above the last frame.

    Raises:
        CoschedError: the first look finds nothing.
    """
    lengths: deque[float] = deque(maxlen=LENGTHS_KEPT)

    def look() -> RenderableType:
        status = source.look()
        lengths.append(status.recent_acceptance_length)
        return frame(source.name, status, tuple(lengths))

    shown = look()
    if once:
        console.print(shown)
        return
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                sleep(interval)
                try:
                    shown = latest = look()
                except CoschedError as error:
                    latest = Group(Text(str(error), style="bold red"), "", shown)
                live.update(latest, refresh=True)
        except KeyboardInterrupt:
            return
