"""The summary of a run, read back and set as a table of arms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cosched.errors import RunFolderError
from cosched.report.intervals import Ratio, paired_ratio
from cosched.settings.arms import FROZEN, PLAIN, adapts, beside
from cosched.telemetry.metrics import ArmSummary, RunSummary, TextFigures

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console, ConsoleOptions, RenderResult

Measured = ArmSummary | TextFigures
"""What has a speed: an arm, on all text or on some."""
DASH = "\u2013"  # an en dash
TIMES = "\u00d7"  # a multiplication sign
SPEED = 5  # which of COLUMNS it is
SHARES = ("draft", "verify", "update", "publish")
CAPTION = (
    "τ: tokens committed per request and round, bonus token included, pooled; novel: only rounds "
    "whose last eight tokens are new; repeat: tokens where they are not; time %: draft/verify/"
    "update/publish, the rest is prefill and bookkeeping"
)
PLAIN_SPEED = f"{TIMES}\nplain"

COLUMNS = (
    ("arm", "one way of decoding the same prompts"),
    ("tokens", "tokens committed"),
    ("τ", "tokens committed per request and round, bonus token included, pooled"),
    ("τ\nnovel", "the same over rounds at novel positions only"),
    ("repeat", "share of tokens whose eight predecessors occurred before in the request"),
    ("tokens\n/s", "tokens committed per second of the arm's own time"),
    (PLAIN_SPEED, "speed as a multiple of the arm plain, and its 95 % interval"),
    (f"{TIMES}\nfrozen", "speed as a multiple of the same draft frozen, and its 95 % interval"),
    ("time %\nd/v/u/p", "share of time drafting / verifying / updating / publishing"),
    ("updates/\nversion", "training updates, and the last published draft version"),
    ("texts\ndiffer", "requests whose tokens differ from the reference arm's"),
)
MEASURED = tuple(COLUMNS[place] for place in (2, 3, SPEED, 6, 7))
EXPENDABLE = (
    "tokens",
    "updates/\nversion",
    "repeat",
    "time %\nd/v/u/p",
    "texts\ndiffer",
    PLAIN_SPEED,
)


def load_summary(run_dir: Path) -> RunSummary:
    """Read ``summary.json`` of a run folder.

    Raises:
        RunFolderError: the folder or the file is missing, or the file is damaged.
    """
    path = run_dir / "summary.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunSummary)
    except OSError as error:
        why = "there is no summary.json in it" if run_dir.is_dir() else "there is no such folder"
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            why = f"summary.json cannot be read: {error.strerror or error}"
        raise RunFolderError(f"{run_dir} is no finished run: {why}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error


def summary_table(summary: RunSummary) -> Table:
    """One row per arm; 100 columns show all of it, fewer leave out what is needed least."""
    return _ArmTable(summary)


class _ArmTable(Table):
    """Leaves out columns where the terminal is narrow: a figure cut in half would be a wrong one."""

    def __init__(self, summary: RunSummary, left_out: tuple[str, ...] = ()) -> None:
        names = ", ".join(header.replace("/\n", "/").replace("\n", " ") for header in left_out)
        super().__init__(
            title=f"{summary.run.get('name', 'run')}: {len(summary.arms)} arms on the same requests"
            + (" (interrupted)" if summary.run.get("interrupted") else ""),
            title_justify="left",
            caption=_caption(summary) + (f"; no room here for: {names}" if left_out else ""),
            caption_justify="left",
            caption_style="dim",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        self._summary = summary
        shown = [index for index, (header, _) in enumerate(COLUMNS) if header not in left_out]
        for index in shown:
            self.add_column(
                COLUMNS[index][0],
                justify="right" if index else "left",
                vertical="bottom",
                no_wrap=True,
            )
        fastest = max((arm.tokens_per_s for arm in summary.arms.values()), default=0.0)
        for name, arm in summary.arms.items():
            cells = [Text(cell) for cell in arm_cells(summary, name)]
            cells[0].stylize("bold")
            if arm.tokens_per_s == fastest > 0 and len(summary.arms) > 1:
                cells[SPEED].stylize("bold green")
            self.add_row(*(cells[index] for index in shown))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = self
        for number in range(len(EXPENDABLE) + 1):
            fitting = _ArmTable(self._summary, EXPENDABLE[:number])
            natural = Measurement.get(console, options.update_width(1000), fitting).maximum
            if natural <= options.max_width:
                break
        yield from Table.__rich_console__(fitting, console, options)


def _caption(summary: RunSummary) -> str:
    if len(summary.arms) < 2:
        return CAPTION
    if any(arm.parts for arm in summary.arms.values()):
        return f"{CAPTION}; in brackets: 95\u00a0% interval of a ratio of speeds"
    return f"{CAPTION}; too short a run for an interval of {TIMES}"


def arm_cells(summary: RunSummary, name: str) -> list[str]:
    """The cells of an arm under ``COLUMNS``; a figure that does not exist is a dash."""
    arm = summary.arms[name]
    drafts = bool(arm.position_acceptance)
    tau, novel, *speeds = measured_cells(summary.arms, name)
    return [
        name,
        f"{arm.tokens:,}",
        tau,
        novel,
        percent(arm.repeat_fraction) if arm.tokens else DASH,
        *speeds,
        "/".join(f"{100 * share:.0f}" for share in time_shares(arm)) if arm.tokens else DASH,
        f"{arm.updates}/{arm.versions}" if drafts and adapts(name) else DASH,
        _differing(summary, name),
    ]


def measured_cells(arms: Mapping[str, Measured], name: str) -> list[str]:
    """Those of ``MEASURED``, which an arm has on all text and on some."""
    arm = arms[name]
    return [
        f"{arm.tau:.2f}" if arm.rounds else DASH,
        DASH if arm.tau_novel is None else f"{arm.tau_novel:.2f}",
        f"{arm.tokens_per_s:.1f}" if arm.tokens_per_s else DASH,
        times(speed_ratio(arms, name, PLAIN)),
        times(speed_ratio(arms, name, beside(name, FROZEN))),
    ]


def speed_ratio(arms: Mapping[str, Measured], name: str, base: str) -> Ratio | None:
    """Tokens per second of an arm over those of another; None where either was not measured.

    It is of the parts that both have, and without an interval where there are none.
    """
    arm, other = arms[name], arms.get(base)
    if other is None or not other.tokens_per_s or not arm.tokens_per_s:
        return None
    if arm.parts and other.parts and name != base:
        return paired_ratio(arm.parts, other.parts)
    return Ratio(arm.tokens_per_s / other.tokens_per_s)


def arm_seconds(arm: ArmSummary) -> float:
    """The arm's own time. An arm that was cut short may have stages but no wall time yet."""
    stages = sum(seconds for stage, seconds in arm.seconds.items() if stage != "wall")
    return max(arm.seconds.get("wall", 0.0), stages)


def time_shares(arm: ArmSummary) -> list[float]:
    """Shares of the arm's time spent on each of ``SHARES``."""
    whole = arm_seconds(arm)
    return [arm.seconds.get(stage, 0.0) / whole if whole else 0.0 for stage in SHARES]


def compared_requests(summary: RunSummary, name: str) -> int:
    """How many of an arm's requests the reference arm has as well."""
    reference = summary.arms.get(str(summary.run.get("lossless_reference")))
    return min(summary.arms[name].requests, reference.requests if reference else 0)


def _differing(summary: RunSummary, name: str) -> str:
    mismatches = summary.arms[name].lossless_mismatches
    if mismatches is None:
        return DASH
    if name == summary.run.get("lossless_reference"):
        return "ref."
    return f"{mismatches} of {compared_requests(summary, name)}"


def percent(share: float, signed: bool = False) -> str:
    """``0.123`` as ``12 %``, with a space that does not break; a minus sign, not a hyphen."""
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 or value == 0 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}\u00a0%".replace("-", "\u2212")


def times(ratio: Ratio | None) -> str:
    """A ratio as ``1.06x (1.02-1.10)``, with a proper sign and dash; no brackets if no interval."""
    if ratio is None:
        return DASH
    interval = f" ({ratio.low:.2f}{DASH}{ratio.high:.2f})" if ratio.low is not None else ""
    return f"{ratio.value:.2f}{TIMES}{interval}"
