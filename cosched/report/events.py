"""``events.jsonl`` read back, per arm and in the order of time; a half-written line is skipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.records import RoundRow, Verdict
from cosched.telemetry.metrics import Turn

if TYPE_CHECKING:
    from pathlib import Path


class _Round(msgspec.Struct):
    arm: str
    row: RoundRow


class _Request(msgspec.Struct):
    arm: str
    id: str
    text: str
    source: str | None = None


class _Result(msgspec.Struct):
    losses: list[float | None]  # null: JSON's word for a loss that was not finite


class _Update(msgspec.Struct):
    arm: str
    round: int
    result: _Result


class _Version(msgspec.Struct):
    version: int


class _Publication(msgspec.Struct):
    arm: str
    round: int
    version: _Version


class _Judged(msgspec.Struct):
    arm: str
    round: int
    verdict: Verdict


class _Turn(msgspec.Struct):
    arm: str
    turn: Turn


class _Rollback(msgspec.Struct):
    arm: str
    round: int


class _Reset(msgspec.Struct):
    arm: str
    round: int


_KINDS: dict[str, type] = {
    "round": _Round,
    "request": _Request,
    "update": _Update,
    "publication": _Publication,
    "verdict": _Judged,
    "turn": _Turn,
    "rollback": _Rollback,
    "reset": _Reset,
}


class _EngineFacts(msgspec.Struct):
    max_batch: int = 1


class _ConfigFacts(msgspec.Struct):
    engine: _EngineFacts = msgspec.field(default_factory=_EngineFacts)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a look of the guard's made of learning; a hypothesis is rejected from 1 on."""

    round: int
    better: float
    worse: float


@dataclass(slots=True)
class ArmEvents:
    """What an arm wrote. ``rows`` are as in the file: request by request.

    ``losses`` and ``publications`` carry the co-scheduler's round at which they happened, ``rollbacks`` and
    ``resets`` (a request ended whose draft was its own) are such rounds. The loss is that of an
    update's first step, before the step has learnt from its own rows.
    """

    rows: list[RoundRow] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    publications: list[tuple[int, int]] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    resets: list[int] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    # The file of each request, where there are several.
    sources: dict[str, str | None] = field(default_factory=dict)

    def in_time(self, max_batch: int) -> list[RoundRow]:
        """Rows in the order in which they were committed.

        Requests run in groups of ``max_batch`` of one file that start together, so a request's j-th
        row belongs to the j-th round of its group. Draft versions never fall, which settles what
        that does not.
        """
        group: dict[str, int] = {}
        count: dict[str, int] = {}
        keys: list[tuple[int, int, int]] = []
        source, last, room = None, -1, 0
        for row in self.rows:
            if row.request_id not in group:
                own = self.sources.get(row.request_id)
                if not room or own != source:
                    source, last, room = own, last + 1, max_batch
                group[row.request_id], room = last, room - 1
            step = count[row.request_id] = count.get(row.request_id, -1) + 1
            keys.append((row.draft_version, group[row.request_id], step))
        order = sorted(range(len(self.rows)), key=keys.__getitem__)
        return [self.rows[index] for index in order]


@dataclass(slots=True)
class RunEvents:
    """All arms' events, how many lines were unreadable, and how many requests ran at a time."""

    arms: dict[str, ArmEvents] = field(default_factory=dict)
    num_damaged: int = 0
    max_batch: int = 1

    def of(self, arm: str) -> ArmEvents:
        """An arm's events; empty if it wrote none."""
        return self.arms.get(arm, ArmEvents())


def read_events(run_dir: Path) -> RunEvents:
    """Read the events of a run; what is missing or damaged is left out and counted."""
    events = RunEvents(max_batch=_max_batch(run_dir / "config.yaml"))
    path = run_dir / "events.jsonl"
    if not path.is_file():
        return events
    with path.open("rb") as lines:
        for line in lines:
            try:
                _take(events, msgspec.json.decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                events.num_damaged += 1
    return events


def _take(events: RunEvents, line: Any) -> None:
    kind = _KINDS.get(str(line.get("kind"))) if isinstance(line, dict) else None
    if kind is None:
        return  # another version's event, or one that no figure is made of
    event = msgspec.convert(line, kind)
    arm = events.arms.setdefault(event.arm, ArmEvents())
    match event:
        case _Round():
            arm.rows.append(event.row)
        case _Request():
            arm.texts[event.id] = event.text
            arm.sources[event.id] = event.source
        case _Update():
            if event.result.losses and event.result.losses[0] is not None:
                arm.losses.append((event.round, event.result.losses[0]))
        case _Judged():
            better, worse = event.verdict.evidence_better, event.verdict.evidence_worse
            if better is not None and worse is not None:
                arm.evidence.append(Evidence(event.round, better, worse))
        case _Turn():
            arm.turns.append(event.turn)
        case _Reset():
            arm.resets.append(event.round)
        case _Rollback():
            if event.round not in arm.resets[-1:]:  # a reset is told as a rollback as well
                arm.rollbacks.append(event.round)
        case _:
            arm.publications.append((event.round, event.version.version))


def _max_batch(config: Path) -> int:
    try:
        return msgspec.yaml.decode(config.read_bytes(), type=_ConfigFacts).engine.max_batch
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return 1
