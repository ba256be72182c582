"""Several runs beside each other: which settings differ, and what each arm did in each of them.

Ratios are to the first run. They have an interval where both runs said the same texts: of
acceptance length over requests, each left out in both; of speed over parts of the text, cut from the turns
of both. Runs were made one after the other, so what the machine did in one of them alone is in no
interval.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import RunFolderError
from cosched.report.events import read_events
from cosched.report.findings import is_replay, per_request
from cosched.report.intervals import Ratio, cut, paired_ratio
from cosched.report.shares import ratio_of_shares
from cosched.report.table import DASH, TIMES, load_summary, times
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cosched.report.events import RunEvents
    from cosched.telemetry.metrics import RunSummary, Turn

NAMES = ("run.name", "run.dir")  # of a run, and not of what it did
FACTS = ("command", "engine", "text", "device", "num_threads", "machine", "torch", "python",
         "cosched", "finished_at", "interrupted")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is compared; ``settings`` by their dotted keys."""

    label: str
    summary: RunSummary
    events: RunEvents
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """An arm in one run, against the same arm in the first; ``same_texts``: None where unknown."""

    arm: str
    run: str
    tau: float
    tau_novel: float | None
    tokens_per_s: float
    tau_ratio: Ratio | None
    speed_ratio: Ratio | None
    same_texts: bool | None

    def cells(self) -> list[str]:
        """Under ``HEADER``."""
        return [
            f"{self.tau:.2f}" if self.tau else DASH,
            times(self.tau_ratio),
            DASH if self.tau_novel is None else f"{self.tau_novel:.2f}",
            f"{self.tokens_per_s:.1f}" if self.tokens_per_s else DASH,
            times(self.speed_ratio),
        ]


NOVEL = "τ novel"
HEADER = ("τ", f"{TIMES} first", NOVEL, "tokens/s", f"{TIMES} first")


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs.

    Raises:
        RunFolderError: one is no finished run, or is named twice.
    """
    labels = _labels([folder.resolve() for folder in folders])
    return [
        Run(label, load_summary(folder), read_events(folder), _settings(folder / "config.yaml"))
        for label, folder in zip(labels, folders, strict=True)
    ]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as many folders of it as tell them apart."""
    if len(set(folders)) < len(folders):
        raise RunFolderError("a run is compared with itself: name every folder once")
    for number in range(1, max(len(folder.parts) for folder in folders)):
        labels = ["/".join(folder.parts[-number:]) for folder in folders]
        if max(Counter(labels).values()) == 1:
            return labels
    return [str(folder) for folder in folders]


def _settings(path: Path) -> dict[str, str]:
    try:
        with explained(path, "read"):
            return dict(_flat(msgspec.yaml.decode(path.read_bytes())))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        listed = isinstance(value, list)
        yield key, ", ".join(map(str, value)) if listed else "none" if value is None else str(value)


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Each key that the runs do not agree on, with its value in each; a dash where it is not there."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NAMES)
    found = [[key, *(run.settings.get(key, DASH) for run in runs)] for key in keys]
    return [row for row in found if len(set(row[1:])) > 1]


def differing_facts(runs: Sequence[Run]) -> list[list[str]]:
    """The same of what the runs say of themselves."""
    found = [[name, *(str(run.summary.run.get(name, DASH)) for run in runs)] for name in FACTS]
    return [row for row in found if len(set(row[1:])) > 1]


def shared_arms(runs: Sequence[Run]) -> list[str]:
    """Arms that the first run has, and another too."""
    return [arm for arm in runs[0].summary.arms if any(arm in run.summary.arms for run in runs[1:])]


def lines(runs: Sequence[Run]) -> list[Line]:
    """Each shared arm in each run that has it."""
    return [
        _line(arm, runs[0], run)
        for arm in shared_arms(runs)
        for run in runs
        if arm in run.summary.arms
    ]


def _line(arm: str, first: Run, run: Run) -> Line:
    own = run.summary.arms[arm]
    same = tau = speed = None
    if run is not first:
        same = same_texts(first, run, arm)
        tau, speed = _tau_ratio(arm, first, run, same), _speed_ratio(arm, first, run, same)
    return Line(arm, run.label, own.tau, own.tau_novel, own.tokens_per_s, tau, speed, same)


def same_texts(first: Run, run: Run, arm: str) -> bool | None:
    """Whether an arm said the same in both, request by request; None where texts were not kept."""
    ours, theirs = run.events.of(arm).texts, first.events.of(arm).texts
    if not ours or not theirs:
        return None
    return ours == theirs


def _tau_ratio(arm: str, first: Run, run: Run, same: bool | None) -> Ratio | None:
    own, other = run.summary.arms[arm], first.summary.arms[arm]
    if not own.rounds or not other.rounds:
        return None
    ours, theirs = (per_request(one.events.of(arm).rows) for one in (run, first))
    if same and ours.keys() == theirs.keys():
        return ratio_of_shares(list(ours.values()), [theirs[name] for name in ours])
    return Ratio(own.tau / other.tau)


def _speed_ratio(arm: str, first: Run, run: Run, same: bool | None) -> Ratio | None:
    own, other = run.summary.arms[arm], first.summary.arms[arm]
    if is_replay(run.summary) or is_replay(first.summary):
        return None  # no target ran: these are no speeds of serving
    if not own.tokens_per_s or not other.tokens_per_s:
        return None
    if same:
        ours, theirs = _aligned_turns(arm, run, first)
        parts, _ = cut({"ours": ours, "theirs": theirs})
        if parts["ours"] and parts["theirs"]:
            return paired_ratio(parts["ours"], parts["theirs"])
    return Ratio(own.tokens_per_s / other.tokens_per_s)


def _aligned_turns(arm: str, run: Run, first: Run) -> tuple[list[Turn], list[Turn]]:
    """Turns in both runs whose groups are the same requests; none where groups cannot be matched.

    Requests may come in another order where each is a group by itself.
    """
    ours, theirs = run.events.of(arm), first.events.of(arm)
    if run.events.max_batch != first.events.max_batch:
        return [], []
    if [*ours.texts] == [*theirs.texts]:
        return ours.turns, theirs.turns
    if any(
        max((t.group for t in one.turns), default=0) != len(one.texts) for one in (ours, theirs)
    ):
        return [], []
    place = {request: group for group, request in enumerate(theirs.texts, 1)}
    groups = [place[request] for request in ours.texts]
    moved = [msgspec.structs.replace(t, group=groups[t.group - 1]) for t in ours.turns]
    return sorted(moved, key=lambda turn: turn.group), theirs.turns


def findings(found: Sequence[Line], first: str) -> list[str]:
    """What is outside of its interval, in sentences."""
    said: list[str] = []
    for line in found:
        for what, ratio in (("τ", line.tau_ratio), ("tokens/s", line.speed_ratio)):
            if ratio is not None and (ratio.above or ratio.below):
                said.append(f"{line.arm} in {line.run}: {what} {times(ratio)} that of {first}.")
    return said or [
        "No arm differs from the first run by more than chance explains, as far as known."
    ]


def text_line(found: Sequence[Line]) -> str:
    """Whether the texts were the same, and what follows."""
    compared = [line for line in found if line.tau_ratio is not None]
    same = [line for line in compared if line.same_texts]
    if len(same) == len(compared):
        how = "The runs said the same texts, so ratios are paired"
    elif same:
        how = (
            "Only some arms said the same texts in both runs; theirs are the ratios that are paired"
        )
    else:
        how = "The runs did not say the same texts, or did not keep them: no ratio has an interval"
    return (
        f"{how}. In brackets: 95\u00a0%, of τ over requests, of tokens/s over parts of the text, six "
        "of either at least. The runs were not made at the same time: what the machine did in one of them alone is "
        "in no interval."
    )
