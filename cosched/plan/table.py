"""A forecast as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from cosched.report.memory import in_units
from cosched.report.table import DASH, TIMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.plan.forecast import Band, Forecast, Line

OF_A_TRAINER = {"trainer busy", "rows dropped", "to the trainer, B/s", "to the servers, B/s", "trainer memory",
                "rounds that wait"}  # fmt: skip


def lines_table(found: Forecast) -> Table:
    """A column for each number of servers; in brackets the lowest and the highest of the repeats."""
    sidecar = any(line.trainer_memory is not None for line in found.lines)
    table = Table(
        title=f"{found.arm}: {found.requests} requests at once on each server, {found.seconds:g} s from a draft as loaded on",
        title_justify="left",
        caption=(
            f"in brackets: lowest and highest of {found.repeats} repeats, all but the first on requests drawn "
            f"anew from the run; {TIMES} frozen: tokens/s over those of the draft as loaded"
        ),
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("servers")
    for line in found.lines:
        table.add_column(f"{line.servers:,}", justify="right")
    for name, cell in _ROWS.items():
        if sidecar or name not in OF_A_TRAINER:
            table.add_row(name, *(cell(line) for line in found.lines))
    return table


def _banded(of: Callable[[Line], Band], shown: Callable[[float], str]) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        band = of(line)
        value, low, high = shown(band.value), shown(band.low), shown(band.high)
        return value if low == high else f"{value} ({low}{DASH}{high})"

    return cell


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tokens(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _bytes(number: float | None) -> str:
    return DASH if number is None else in_units(round(number))


_ROWS: dict[str, Callable[[Line], str]] = {
    "τ frozen": _banded(lambda line: line.tau_frozen, "{:.2f}".format),
    "τ learning": _banded(lambda line: line.tau, "{:.2f}".format),
    "τ learning, at the end": _banded(lambda line: line.tau_end, "{:.2f}".format),
    "tokens/s of a server": _banded(lambda line: line.tokens_per_server, _tokens),
    "tokens/s of all": _banded(lambda line: line.tokens, _tokens),
    f"{TIMES} frozen": _banded(lambda line: line.speed, "{:.3f}".format),
    "learning's share of the time": _banded(lambda line: line.exposed, _percent),
    "updates/s": _banded(lambda line: line.updates, "{:.3g}".format),
    "trainer busy": _banded(lambda line: line.busy, _percent),
    "tokens trained on": _banded(lambda line: line.seen, _percent),
    "rows dropped": _banded(lambda line: line.dropped, _percent),
    "to the trainer, B/s": _banded(lambda line: line.bytes_to_trainer, _bytes),
    "to the servers, B/s": _banded(lambda line: line.bytes_to_servers, _bytes),
    "server memory": lambda line: _bytes(line.server_memory),
    "rounds that wait": lambda line: _bytes(line.queue_memory),
    "trainer memory": lambda line: _bytes(line.trainer_memory),
}


def costs_table(found: Forecast) -> Table:
    """What it was made of, and where each of it comes from."""
    table = Table(title="made of", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("what", "is", "", "because"):
        table.add_column(name, justify="right" if name == "is" else "left")
    for name, figure in found.costs.items():
        table.add_row(name, _cost(name, figure.value), figure.how, figure.why)
    return table


def _cost(name: str, value: float) -> str:
    if not np.isfinite(value):
        return "no limit"
    if name.startswith("link"):
        return f"{in_units(round(value))}/s"
    if name.startswith(("rounds", "tokens", "updates")):
        return f"{value:.3g}"
    return f"{1e3 * value:.3g} ms"


def sentences(found: Forecast) -> list[str]:
    """Whether it pays, how far one trainer reaches, and what cannot be known."""
    said = [_pays(found, line) for line in found.lines]
    if found.limits:
        reached = [
            f"{one.what} from {one.servers:,} servers on" for one in found.limits if one.servers
        ]
        first = found.limits[0]
        said.append(f"full first: {'; '.join(reached) or 'nothing of what is looked at'}")
        if first.servers is not None:
            said.append(f"then: {first.then}")
    return [*said, *found.notes]


def _pays(found: Forecast, line: Line) -> str:
    speed = line.speed
    word = "pays" if speed.low > 1.0 else "costs" if speed.high < 1.0 else "may pay or cost"
    plain = found.plain_tokens
    of_plain = f", {line.tokens_per_server.value / plain:.2f} of no draft" if plain else ""
    return (
        f"{line.servers:,} {'server' if line.servers == 1 else 'servers'}: learning {word}, "
        f"{speed.value:.3f} of the draft as loaded ({speed.low:.3f}{DASH}{speed.high:.3f}){of_plain}"
    )
