"""What a run left for a plan: rounds with what their draft had learnt, and seconds by what took them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cosched.records import RoundRow
from cosched.telemetry.metrics import Turn
from cosched.telemetry.run_folder import explained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


class _Result(msgspec.Struct):
    seconds: float
    num_steps: int = 1
    num_skipped: int = 0


class _Version(msgspec.Struct):
    version: int
    seconds: float = 0.0


class _Verdict(msgspec.Struct):
    action: str
    to: int | None = None


class _Event(msgspec.Struct):
    """A line of ``events.jsonl``, of which no kind has all fields; what others there are is passed over."""

    kind: str
    arm: str = ""
    round: int = 0
    row: RoundRow | None = None
    turn: Turn | None = None
    result: _Result | None = None
    version: _Version | None = None
    verdict: _Verdict | None = None
    to: int | None = None
    time: float | None = None


@dataclass(slots=True)
class Group:
    """Requests that were decoded together: rounds of each, and seconds by what they were spent on."""

    rounds: Counter[str] = field(default_factory=Counter[str])
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))

    def batches(self, max_batch: int) -> int:
        """Rounds of the engine: the requests of a group begin together, and those that go on share them."""
        each = self.rounds.values()
        return max(max(each, default=0), -(-sum(each) // max_batch))


@dataclass(slots=True)
class Learning:
    """Updates and publications as they came. ``contained`` is how many updates are in each version."""

    contained: dict[int, int] = field(default_factory=lambda: {0: 0})
    update_seconds: list[float] = field(default_factory=list[float])
    publish_seconds: list[float] = field(default_factory=list[float])
    look_rounds: list[int] = field(default_factory=list[int])
    busy_seconds: list[float] = field(default_factory=list[float])  # from decision to verdict
    published: int = 0  # versions that had learnt something
    ahead: int = 0  # updates in the copy that learns
    _decided_at: float | None = None
    _updated: int | None = None
    _back: bool = False  # the next publication is of what was there before

    def take(self, event: _Event) -> None:
        """One more event, in the order of the file."""
        match event.kind:
            case "decision":
                self._decided_at = event.time
            case "update" if event.result is not None:
                self.ahead += event.result.num_skipped < event.result.num_steps
                self.update_seconds.append(event.result.seconds)
                self._updated = event.round
            case "verdict" if event.verdict is not None:
                self._judged(event, event.verdict)
            case "reset":
                self.ahead = 0
            case "rollback":
                self.ahead, self._back = self.contained.get(event.to or 0, 0), True
            case "publication" if event.version is not None:
                self.contained[event.version.version] = self.ahead
                self.published += self.ahead > 0 and not self._back
                self._back = False
                self.publish_seconds.append(event.version.seconds)
            case _:
                pass

    def _judged(self, event: _Event, verdict: _Verdict) -> None:
        if verdict.action == "roll_back":
            self.ahead = self.contained.get(verdict.to or 0, 0)
        if self._updated is not None:
            self.look_rounds.append(event.round - self._updated)
            if event.time is not None and self._decided_at is not None:
                self.busy_seconds.append(event.time - self._decided_at)
        self._updated = self._decided_at = None

    @property
    def updates(self) -> int:
        return len(self.update_seconds)


@dataclass(slots=True)
class ArmRecord:
    """What an arm wrote; ``rounds`` by request, in the order of its text."""

    rounds: defaultdict[str, list[tuple[int, int, int]]] = field(
        default_factory=lambda: defaultdict[str, list[tuple[int, int, int]]](list)
    )
    groups: defaultdict[int, Group] = field(default_factory=lambda: defaultdict[int, Group](Group))
    learning: Learning = field(default_factory=Learning)
    _group: int = 1

    def take(self, event: _Event) -> None:
        """One more event; the rounds of a request come behind the turn in which it ended."""
        if event.turn is not None:
            self._group = event.turn.group
            spent = self.groups[self._group].seconds
            for stage, seconds in event.turn.stages.items():
                spent[stage] += seconds
            spent["other"] += event.turn.seconds - sum(event.turn.stages.values())
        elif event.row is not None:
            row = event.row
            self.rounds[row.request_id].append((row.position, row.num_committed, row.draft_version))
            self.groups[self._group].rounds[row.request_id] += 1
        else:
            self.learning.take(event)

    def table(self) -> dict[str, NDArray[np.int64]]:
        """By request, of each round where it began, what it committed, and how many updates its draft had seen."""
        contained = self.learning.contained
        return {
            name: np.array(
                [(at, committed, contained.get(version, 0)) for at, committed, version in rows]
            )
            for name, rows in self.rounds.items()
        }

    def seconds(self, *stages: str) -> float:
        """Of all groups."""
        return sum(group.seconds[stage] for group in self.groups.values() for stage in stages)

    def batches(self, max_batch: int) -> int:
        """Rounds of the engine."""
        return sum(group.batches(max_batch) for group in self.groups.values())

    @property
    def num_rounds(self) -> int:
        return sum(map(len, self.rounds.values()))

    @property
    def num_tokens(self) -> int:
        return sum(committed for rows in self.rounds.values() for _, committed, _ in rows)

    @property
    def mean_publish_seconds(self) -> float | None:
        own = self.learning.publish_seconds
        return fmean(own) if own else None


def read_arms(folder: Path) -> dict[str, ArmRecord]:
    """All arms of a run; the arm of a trainer's folder, which names none, is ``""``.

    Raises:
        RunFolderError: the file cannot be read.
    """
    arms: dict[str, ArmRecord] = defaultdict(ArmRecord)
    for event in _events(folder / "events.jsonl"):
        arms[event.arm].take(event)
    return arms


def _events(path: Path) -> Iterator[_Event]:
    """Lines that are events; one that was cut off is left out."""
    decoder = msgspec.json.Decoder(_Event)
    with explained(path, "read"), path.open("rb") as lines:
        for line in lines:
            try:
                yield decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
