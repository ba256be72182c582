"""One frame of ``cosched top``: a status as text that can be read without colours."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from cosched.engines.sglang.worker.operator import Status
    from cosched.records import GuardFigures

BAR = 14  # cells of a whole bar
SPARKS = "▁▂▃▄▅▆▇█"
DASH = "\u2013"


def frame(name: str, status: Status, lengths: Sequence[float] = ()) -> RenderableType:
    """All of a status; ``lengths`` are the acceptance lengths that were seen before, the oldest first."""
    parts: list[RenderableType] = [_head(name, status)]
    parts += [Text.assemble((" ALARM ", "bold white on red"), f" {alarm}: {text}")
              for alarm, text in status.alarms.items()]  # fmt: skip
    parts += ["", _lengths(status, lengths), "", _places_and_depths(status)]
    if status.figures.versions:
        parts += ["", _versions(status)]
    parts += ["", _learning(status)]
    return Group(*parts)


def _head(name: str, status: Status) -> Text:
    state, style = "learning", "bold green"
    if status.failure is not None:
        state, style = "training stopped", "bold red"
    elif not status.adapting:
        state, style = "not learning", "bold yellow"
    return Text.assemble(
        ("cosched top", "bold"), f"  {name}  {status.algorithm}  ", (state, style),
        f"  draft version {status.draft_version}",
    )  # fmt: skip


def _lengths(status: Status, lengths: Sequence[float]) -> Table:
    table = _grid()
    frozen = status.frozen_acceptance_length
    gain = f" ({status.recent_acceptance_length / frozen - 1:+.0%} on it)" if frozen else ""
    table.add_row("τ now", f"[bold]{status.recent_acceptance_length:.2f}[/]  {spark(lengths)}")
    table.add_row("τ frozen, estimate", f"{number(frozen)}{gain}")
    table.add_row(
        "τ since the start", f"{number(status.acceptance_length)}, {status.rounds:,} rounds"
    )
    if status.round_seconds:
        table.add_row(
            "round",
            f"{1000 * status.round_seconds:.1f} ms, {status.num_running} running, "
            f"{status.num_queued} waiting",
        )
    return table


def _places_and_depths(status: Status) -> Table:
    recent, depths = status.figures.recent, status.figures.depths
    places = _columns("place", f"accepted, newest {recent.rounds:.0f}")
    for at, place in enumerate(recent.places, 1):
        share = place.share or 0.0
        places.add_row(str(at), f"{bar(share)} {share:4.0%}")
    by_depth = _columns("answer at", "τ", "rounds")
    longest = max((one.committed / one.rounds for one in depths), default=1.0)
    for depth in depths:
        length = depth.committed / depth.rounds
        by_depth.add_row(depth.label, f"{bar(length / longest)} {length:.2f}", f"{depth.rounds:,}")
    both = Table.grid(padding=(0, 3, 0, 0))
    both.add_row(places, by_depth)
    return both


def _versions(status: Status) -> Table:
    """The time line: each version with when it began to serve and what came of it."""
    table = _columns("version", "since", "request rounds", "τ")
    for one in status.figures.versions:
        table.add_row(
            "0 (as loaded)" if one.version == 0 else str(one.version),
            time.strftime("%H:%M:%S", time.localtime(one.since)) if one.since else DASH,
            f"{one.rounds:,}",
            f"{one.committed / one.rounds:.2f}",
        )
    return table


def _learning(status: Status) -> Table:
    table = _grid()
    loss = "" if status.last_loss is None else f", loss {status.last_loss:.3f}"
    table.add_row(
        "updates",
        f"{status.updates:,}, {status.refused_updates:,} refused, {status.rollbacks:,} rolled back{loss}",
    )
    if status.guard is not None:
        _guard(table, status.guard)
    times = {
        kind: getattr(status, f"{kind}_seconds")
        for kind in ("draft", "verify", "update", "publish")
    }
    if whole := sum(times.values()):
        exposed = times["update"] + times["publish"]
        listed = ", ".join(f"{kind} {seconds / whole:.1%}" for kind, seconds in times.items())
        table.add_row(
            "exposed", f"{exposed:.1f} s of {whole:.1f} s that requests waited for learning"
        )
        table.add_row("time", f"{listed} (guard {status.guard_seconds / whole:.1%})")
    if limit := status.replay_max_bytes:
        full = f"{bar(status.replay_bytes / limit)} {size(status.replay_bytes)} of {size(limit)}"
        table.add_row(
            "replay", f"{full}, {status.replay_tokens:,} rows, {status.evicted_requests:,} evicted"
        )
    if status.resident_bytes:
        device = f", {size(status.device_bytes)} device" if status.device_bytes else ""
        table.add_row("memory", f"{size(status.resident_bytes)} host{device}")
    return table


def _guard(table: Table, guard: GuardFigures) -> None:
    """The wealth of its tests against their bounds; above the bound the guard has acted."""
    if guard.lead_tokens is not None and guard.lead_error is not None:
        table.add_row("lead", f"{guard.lead_tokens:+.3f} tokens a round ± {guard.lead_error:.3f}")
    for name, wealth, bound in (
        ("better", guard.better, guard.better_bound),
        ("worse", guard.worse, guard.worse_bound),
    ):
        table.add_row(f"guard: {name}", f"{bar(wealth / bound)} {wealth:.2f} of {bound:.2f}")


def _grid() -> Table:
    """Rows of a name and what there is to say of it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def _columns(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def bar(share: float) -> str:
    """A bar of ``BAR`` cells; what is out of bounds is cut."""
    cells = round(BAR * min(1.0, max(0.0, share)))
    return "█" * cells + "░" * (BAR - cells)


def spark(lengths: Sequence[float]) -> str:
    """A line of levels between the least and the greatest."""
    if len(lengths) < 2:
        return ""
    low, high = min(lengths), max(lengths)
    step = (high - low) or 1.0
    levels = [SPARKS[round((len(SPARKS) - 1) * (one - low) / step)] for one in lengths]
    return f"{''.join(levels)} {low:.2f}{DASH}{high:.2f}"


def number(value: float | None) -> str:
    """A length; a dash where it is not known."""
    return DASH if value is None else f"{value:.2f}"


def size(num_bytes: float) -> str:
    """``512 MB``: in powers of 1024, as memory is counted."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GB"
