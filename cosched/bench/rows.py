"""The figures of runs: pooled over seeds, for each text and arm, with what they are of other arms.

Every figure of a level or a ratio is one of sums, Σ tokens / Σ rounds or Σ tokens / Σ seconds, and its interval
the delete-one jackknife over groups of requests, paired where it is a ratio
(``cosched.report.intervals`` has the mathematics and its source).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from cosched.bench.figures import Figure, Row
from cosched.report.intervals import MIN_PARTS, paired_ratio
from cosched.report.table import load_summary
from cosched.settings.arms import PLAIN, adapts, draft_of
from cosched.telemetry.metrics import GroupFigures, Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cosched.bench.figures import Unit
    from cosched.bench.plan import BenchRun
    from cosched.bench.suite import Compared, RunsSuite

ALL = "all"
UNITS: dict[Compared, Unit] = {
    "tokens_per_s": "tokens/s",
    "tau": "tokens a round",
    "tau_novel": "tokens a round",
    "tau_novel_behind": "tokens a round",
}


class _Place(NamedTuple):
    """Where in the table: labels by axis, the text where there are several, and the whole arm."""

    labels: tuple[tuple[str, str], ...]
    text: str | None
    arm: str


class _Pooled(NamedTuple):
    """What all seeds' runs did there; ``updates`` where all text of the runs is there."""

    groups: list[GroupFigures]
    updates: list[int]
    rollbacks: list[int]


def rows_of(suite: RunsSuite, runs: Sequence[BenchRun]) -> list[Row]:
    """Of every arm on every text, and on all of them where there are several."""
    pooled = _pool(runs)
    timed = all(run.job.config.engine.kind != "trace" or run.job.config.engine.live for run in runs)
    rows = [
        Row(_at(place), dict(_figures(suite, place, pooled, timed)))
        for place in sorted(pooled, key=lambda place: _order(place, pooled))
    ]
    return rows


def too_low(suite: RunsSuite, rows: Sequence[Row]) -> list[str]:
    """What is below ``at_least``, in words; of arms that learn."""
    return [
        f"{' '.join(row.at.values())}: {name} {row.figures[name].value:.3f} is below {least}"
        for row in rows
        for name, least in suite.at_least.items()
        if adapts(row.at["arm"]) and name in row.figures and row.figures[name].value < least
    ]


def _pool(runs: Sequence[BenchRun]) -> dict[_Place, _Pooled]:
    found: dict[_Place, _Pooled] = defaultdict(lambda: _Pooled([], [], []))
    for run in runs:
        labels = tuple(run.labels.items())
        for name, arm in load_summary(run.job.config.run_folder).arms.items():
            sources = dict.fromkeys(group.source for group in arm.by_group)
            whole = found[_Place(labels, None if len(sources) == 1 else ALL, name)]
            whole.groups.extend(arm.by_group)
            whole.updates.append(arm.updates)
            whole.rollbacks.append(arm.rollbacks)
            if len(sources) > 1:
                for group in arm.by_group:
                    found[_Place(labels, group.source, name)].groups.append(group)
    return dict(found)


def _order(place: _Place, pooled: Mapping[_Place, _Pooled]) -> tuple[int, int, int]:
    """Points of the grid as they were run, in each of them all text first, then by text, then by arm."""
    places = list(pooled)
    labels = list(dict.fromkeys(one.labels for one in places))
    own = [one for one in places if one.labels == place.labels]
    texts = sorted(dict.fromkeys(one.text or "" for one in own), key=lambda text: text != ALL)
    arms = list(dict.fromkeys(one.arm for one in own))
    return labels.index(place.labels), texts.index(place.text or ""), arms.index(place.arm)


def _at(place: _Place) -> dict[str, str]:
    """The draft apart from how it is used: drafts are compared with one another, and so are arms."""
    at, draft = dict(place.labels), draft_of(place.arm)
    if place.text is not None:
        at["text"] = f"{at['text']}/{place.text}" if "text" in at else place.text
    if draft is not None:
        at["draft"] = draft
    return {**at, "arm": place.arm if draft is None else place.arm.removeprefix(f"{draft}.")}


def _figures(
    suite: RunsSuite, place: _Place, pooled: Mapping[_Place, _Pooled], timed: bool
) -> Iterator[tuple[str, Figure]]:
    own = pooled[place]
    groups = own.groups
    tokens = sum(group.tokens for group in groups)
    rounds = sum(one.rounds for group in groups for one in group.places)
    yield "tokens", Figure(value=tokens, unit="tokens")
    names: list[Compared] = ["tau", "tau_novel"]
    if suite.behind is not None:
        names.append("tau_novel_behind")
    if timed:
        names.append("tokens_per_s")
    for name in names:
        if (level := _level(_parts(groups, name, suite.behind), UNITS[name])) is not None:
            yield name, level
    repeated = sum(group.repeated for group in groups) / max(1, tokens)
    yield "repeat", Figure(value=repeated, unit="share")
    drafted = sum(group.drafted for group in groups) / max(1, rounds)
    yield "drafted", Figure(value=drafted, unit="tokens a round")
    for name, comparison in suite.against.items():
        control = _best(place, comparison.arms, comparison.figure, suite.behind, pooled)
        if control is not None and (timed or comparison.figure != "tokens_per_s"):
            ours, theirs = (
                _parts(some, comparison.figure, suite.behind) for some in (groups, control)
            )
            yield name, _ratio(ours, theirs)
    if own.updates and adapts(place.arm):
        yield "updates", Figure(value=sum(own.updates), unit="count")
        yield "rolled_back", Figure(value=sum(own.rollbacks), unit="count")


def _best(
    place: _Place,
    names: Sequence[str],
    figure: Compared,
    behind: int | None,
    pooled: Mapping[_Place, _Pooled],
) -> list[GroupFigures] | None:
    """What the best of these arms did there, of those that said as much of it; not the arm itself."""
    draft, ours = draft_of(place.arm), pooled[place].groups
    beside = [name if draft is None or name == PLAIN else f"{draft}.{name}" for name in names]
    if place.arm in {*names, *beside}:
        return None
    there = [
        pooled[one].groups
        for name in dict.fromkeys((*beside, *names))
        if (one := place._replace(arm=name)) in pooled
    ]
    whole = [some for some in there if len(some) == len(ours)]
    return max(whole, key=lambda some: _value(_parts(some, figure, behind)) or 0.0, default=None)


def _parts(groups: Sequence[GroupFigures], figure: Compared, behind: int | None) -> list[Part]:
    """Of each group the two sums whose ratio the figure is: tokens, and seconds or rounds."""
    if figure == "tokens_per_s":
        return [Part(group.tokens, group.seconds) for group in groups]
    first = (behind or 0) if figure == "tau_novel_behind" else 0
    parts: list[Part] = []
    for group in groups:
        own = [place for place in group.places if place.start >= first]
        if figure == "tau":
            sums = sum(place.tokens for place in own), sum(place.rounds for place in own)
        else:
            sums = sum(place.tokens_novel for place in own), sum(p.rounds_novel for p in own)
        parts.append(Part(*sums))
    return parts


def _value(parts: Sequence[Part]) -> float | None:
    """None where there is nothing of it."""
    below = sum(part.seconds for part in parts)
    return sum(part.tokens for part in parts) / below if below else None


def _level(parts: Sequence[Part], unit: Unit) -> Figure | None:
    value = _value(parts)
    if value is None:
        return None
    return _with_interval(value, unit, parts, [Part(1, 1.0)] * len(parts))


def _ratio(ours: Sequence[Part], theirs: Sequence[Part]) -> Figure:
    value = (_value(ours) or 0.0) / (_value(theirs) or 1.0)
    return _with_interval(value, "times", ours, theirs)


def _with_interval(
    value: float, unit: Unit, ours: Sequence[Part], theirs: Sequence[Part]
) -> Figure:
    """None where there are too few groups, or what is pooled comes from one of them alone."""
    solid = all(
        sum(part.tokens > 0 and part.seconds > 0 for part in some) >= MIN_PARTS
        for some in (ours, theirs)
    )
    if not solid:
        return Figure(value=value, unit=unit)
    ratio = paired_ratio(ours, theirs)
    return Figure(value=value, unit=unit, low=ratio.low, high=ratio.high)
