"""What the figures of a run say, in sentences; every number in them is computed here.

An adapted arm is held against the frozen arm of the same draft that sees the same window. The
uncertainty of a gain is a jackknife over requests: what it would have been without each of them in
turn. A difference in speed is claimed only where its interval (``cosched.report.intervals``) leaves
no other choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cosched.report.intervals import MIN_PARTS, MIN_TURNS
from cosched.report.table import arm_seconds, percent, speed_ratio, times
from cosched.settings.arms import (
    FROZEN,
    WINDOW_SUFFIX,
    adapts,
    beside,
    control_of,
    draft_of,
    split_arm,
)

if TYPE_CHECKING:
    from cosched.records import RoundRow
    from cosched.report.events import RunEvents
    from cosched.report.intervals import Ratio
    from cosched.telemetry.metrics import ArmSummary, RunSummary

NO_CONTROL = "No adapted arm with a frozen one to hold it against."
LEARNS_BY_ITSELF = (
    "This draft has no network: it learns by itself while it serves, in the frozen arm as in the "
    "adapted one, and nothing is trained or published. Arms differ by what the clock does."
)
NO_INTERVAL = (
    "This run is too short for an interval of its speeds, so it says nothing of which arm is faster: "
    f"that takes {MIN_PARTS} groups of engine.max_batch requests, or {MIN_PARTS * MIN_TURNS} turns of "
    "every arm."
)

Verdict = Literal["paid", "even", "lost", "none"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An adapted arm against its frozen control; ``gain`` and its error are of τ, relative."""

    adapted: str
    frozen: str
    gain: float
    gain_error: float | None
    num_requests: int
    speed: Ratio | None


@dataclass(frozen=True, slots=True)
class Headline:
    """One sentence for the top of the page, and what must be said right below it."""

    verdict: Verdict
    sentence: str
    details: list[str]


def headline(summary: RunSummary, events: RunEvents) -> Headline:
    """What this run found."""
    found = comparisons(summary, events)
    alone = summary.run.get("learns_by_itself", False)
    if found and not alone:
        return _adapted_headline(summary, found)
    drafted = [n for n, arm in summary.arms.items() if arm.position_acceptance]
    if drafted:
        name = max(drafted, key=lambda n: summary.arms[n].tau)
        ratio = None if is_replay(summary) else speed_ratio(summary.arms, name, "plain")
        pace = f", at {times(ratio)} the speed of plain decoding" if ratio else ""
        sentence = (
            f"{name} committed {summary.arms[name].tau:.2f} tokens per request and round{pace}."
        )
        return Headline("none", sentence, [LEARNS_BY_ITSELF if alone else NO_CONTROL])
    done = [(n, arm) for n, arm in summary.arms.items() if arm.tokens]
    if not done:
        return Headline("none", "Nothing was decoded.", [])
    name, arm = done[0]
    pace = f" at {arm.tokens_per_s:.1f} tokens/s" if arm.tokens_per_s else ""
    sentence = f"{name} decoded {arm.tokens:,} tokens{pace}."
    return Headline("none", sentence, ["No arm with a draft to compare it with."])


def comparisons(summary: RunSummary, events: RunEvents) -> list[Comparison]:
    """Each adapted arm that got anywhere, with the frozen arm of the same window."""
    found: list[Comparison] = []
    for name, arm in summary.arms.items():
        if not adapts(name) or not arm.rounds:
            continue
        control = control_of(name)
        other = summary.arms.get(control)
        if other is None or not other.rounds:
            continue
        error, num_requests = _gain_error(events.of(name).rows, events.of(control).rows)
        speed = None if is_replay(summary) else speed_ratio(summary.arms, name, control)
        found.append(Comparison(name, control, arm.tau / other.tau - 1, error, num_requests, speed))
    return found


def is_replay(summary: RunSummary) -> bool:
    """Whether the target was replaced by a recording, so that seconds are not serving seconds."""
    return summary.run.get("engine") == "trace"


def _gain_error(rows: list[RoundRow], control: list[RoundRow]) -> tuple[float | None, int]:
    """Jackknife standard error of the ratio of pooled τ, and over how many common requests."""
    ours, theirs = per_request(rows), per_request(control)
    names = sorted(ours.keys() & theirs.keys())
    if len(names) < 2:
        return None, len(names)
    ratios: list[float] = []
    for left_out in names:
        kept = [name for name in names if name != left_out]
        ratios.append(_pooled(ours, kept) / _pooled(theirs, kept))
    mean = sum(ratios) / len(ratios)
    variance = (len(ratios) - 1) / len(ratios) * sum((ratio - mean) ** 2 for ratio in ratios)
    return variance**0.5, len(names)


def per_request(rows: list[RoundRow]) -> dict[str, tuple[int, int]]:
    """Committed tokens and rounds of each request."""
    sums: dict[str, tuple[int, int]] = {}
    for row in rows:
        committed, rounds = sums.get(row.request_id, (0, 0))
        sums[row.request_id] = (committed + row.num_committed, rounds + 1)
    return sums


def _pooled(sums: dict[str, tuple[int, int]], names: list[str]) -> float:
    return sum(sums[name][0] for name in names) / sum(sums[name][1] for name in names)


def _adapted_headline(summary: RunSummary, found: list[Comparison]) -> Headline:
    """The fastest adapted arm (in a replay: the one that commits most) speaks for the run."""
    lead = max(found, key=lambda c: (c.speed is not None, _merit(summary, c.adapted)))
    verdict, opening = _verdict(summary, lead)
    details = [
        NO_INTERVAL if lead.speed and not lead.speed.known else "",
        _time_line(summary, lead),
        *_control_lines(summary, lead),
        _novel_line(summary, lead),
        _chance_line(lead),
        *(_gain_line(summary, other) for other in found if other is not lead),
        _fastest_line(summary, lead),
    ]
    sentence = opening + _gain_line(summary, lead)
    return Headline(verdict, sentence, [line for line in details if line])


def _merit(summary: RunSummary, name: str) -> float:
    arm = summary.arms[name]
    return arm.tau if is_replay(summary) else arm.tokens_per_s


def _verdict(summary: RunSummary, c: Comparison) -> tuple[Verdict, str]:
    """Whether it paid: against its own control, and against the best that costs nothing."""
    if c.speed is None or not c.speed.known:
        return "none", ""
    if c.speed.below:
        return "lost", "Adaptation did not pay: "
    free = [name for name in summary.arms if name in _free(c.adapted)]
    best = max(free, key=lambda name: summary.arms[name].tokens_per_s)
    ratio = speed_ratio(summary.arms, c.adapted, best)
    if ratio is not None and ratio.below:
        return "lost", f"Adaptation did not pay: {best}, which costs nothing, is faster. "
    if c.speed.above and (ratio is None or ratio.above):
        return "paid", "Adaptation paid: "
    beside = f"beside {best}, which costs nothing, " if c.speed.above else ""
    return "even", (
        f"Adaptation broke even: {beside}the difference is within what this run can tell. "
    )


def _free(arm: str) -> tuple[str, str]:
    """What the same draft does at no cost."""
    return beside(arm, FROZEN), beside(arm, FROZEN + WINDOW_SUFFIX)


def _gain_line(summary: RunSummary, c: Comparison) -> str:
    ours, theirs = summary.arms[c.adapted], summary.arms[c.frozen]
    error = f"\u00a0±\u00a0{percent(c.gain_error)}" if c.gain_error is not None else ""
    pace = f", at {times(c.speed)} the speed of {c.frozen}" if c.speed else ""
    return (
        f"{c.adapted} committed {ours.tau:.2f} tokens per request and round, {c.frozen} "
        f"{theirs.tau:.2f} ({percent(c.gain, signed=True)}{error}){pace}."
    )


def _time_line(summary: RunSummary, c: Comparison) -> str:
    """Where the time went: what learning cost per token, and what it saved."""
    if c.speed is None:
        return (
            "The target was replayed from a recording, so this run says nothing about speed."
            if is_replay(summary)
            else ""
        )
    ours, theirs = summary.arms[c.adapted], summary.arms[c.frozen]
    learning = _ms(ours, "update") + _ms(ours, "publish")
    saved = _ms(theirs) - (_ms(ours) - learning)
    line = (
        f"Per token, learning cost {learning:.2f} ms ({_ms(ours, 'update'):.2f} training, "
        f"{_ms(ours, 'publish'):.2f} publishing) and everything else became "
        f"{abs(saved):.2f} ms {'cheaper' if saved >= 0 else 'dearer'} than in {c.frozen}."
    )
    if c.speed.below and saved > 0:
        line += f" It would have broken even at {saved:.2f} ms of learning per token."
    return line


def _ms(arm: ArmSummary, stage: str | None = None) -> float:
    seconds = arm_seconds(arm) if stage is None else arm.seconds.get(stage, 0.0)
    return 1000 * seconds / max(1, arm.tokens)


def _novel_line(summary: RunSummary, c: Comparison) -> str:
    ours, theirs = summary.arms[c.adapted].tau_novel, summary.arms[c.frozen].tau_novel
    if not ours or not theirs:
        return ""
    return (
        f"On novel positions it is {ours:.2f} against {theirs:.2f} "
        f"({percent(ours / theirs - 1, signed=True)})."
    )


def _chance_line(c: Comparison) -> str:
    if c.gain_error is None:
        return "There are not two requests to estimate chance from: this gain is an anecdote."
    how = f"± is one jackknife standard error over {c.num_requests} requests"
    if abs(c.gain) <= 2 * c.gain_error:
        return f"{how}: the difference in acceptance is within what chance explains."
    return f"{how}."


def _control_lines(summary: RunSummary, c: Comparison) -> list[str]:
    """How the adapted arm stands against what costs nothing: a window, or no draft at all."""
    lines: list[str] = []
    arms, ours = summary.arms, summary.arms[c.adapted]
    windowed = beside(c.adapted, FROZEN + WINDOW_SUFFIX)
    window = arms.get(windowed)
    if window and window.rounds and not split_arm(c.adapted)[1]:
        ratio = None if is_replay(summary) else speed_ratio(summary.arms, c.adapted, windowed)
        pace = f" and runs at {times(ratio)} its speed" if ratio else ""
        lines.append(
            f"A window alone costs nothing and commits {window.tau:.2f}; {c.adapted} is "
            f"{percent(ours.tau / window.tau - 1, signed=True)} against that{pace}."
        )
    plain = None if is_replay(summary) else speed_ratio(summary.arms, c.adapted, "plain")
    if plain:
        warning = ": no draft at all is faster" if plain.below else ""
        lines.append(f"Against plain decoding {c.adapted} runs at {times(plain)}{warning}.")
    return lines


def _fastest_line(summary: RunSummary, c: Comparison) -> str:
    """Where another draft is faster without learning: that of the headline learns, but is not it."""
    drafted = {name: arm for name, arm in summary.arms.items() if arm.position_acceptance}
    fastest = max(drafted, key=lambda name: drafted[name].tokens_per_s)
    if c.speed is None or draft_of(fastest) == draft_of(c.adapted):
        return ""
    ratio = times(speed_ratio(summary.arms, fastest, c.adapted))
    return f"The fastest arm has another draft: {fastest}, at {ratio} the speed of {c.adapted}."
