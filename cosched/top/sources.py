"""Where ``cosched top`` looks: a server that runs, or the folder of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from cosched.engines.sglang.operators.routes import call, status_of
from cosched.engines.sglang.worker.operator import Status
from cosched.errors import RunFolderError
from cosched.records import RoundRow, Verdict, WeightVersion
from cosched.telemetry.alarms import alarms
from cosched.telemetry.run_folder import explained
from cosched.telemetry.tally import Tally

if TYPE_CHECKING:
    from pathlib import Path


class Source(Protocol):
    """Something that can be looked at again and again."""

    @property
    def name(self) -> str: ...

    def look(self) -> Status:
        """How it stands now.

        Raises:
            CoschedError: there is nothing, or nothing of cosched's.
        """
        ...


class Server:
    """A server of ``cosched serve``, by its routes."""

    def __init__(self, url: str, api_key: str | None, replica: int = 0) -> None:
        self.name = f"{url} (replica {replica})" if replica else url
        self._where = url
        self._api_key = api_key
        self._replica = replica

    def look(self) -> Status:
        return status_of(call(self._where, "status", {}, self._api_key, self._replica))


NOTHING = msgspec.Raw(b"")


class _Event(msgspec.Struct):
    """What a line of ``events.jsonl`` may have."""

    kind: str
    arm: str | None = None
    row: msgspec.Raw = NOTHING
    result: msgspec.Raw = NOTHING
    verdict: msgspec.Raw = NOTHING
    version: msgspec.Raw = NOTHING


class Run:
    """The arm of an experiment, by the events in its folder: what has been written since is read on.

    Rounds are written when their request has finished, so that long answers show late. What no event
    tells (times, memory, the queue) stays at nothing.
    """

    def __init__(self, folder: Path, arm: str) -> None:
        self.name = f"{folder} ({arm})"
        self._folder = folder
        self._arm = arm
        self._offset = 0
        self._others: set[str] = set()
        self._tally = Tally(lambda: 0.0)
        self._known: dict[str, Any] = {"updates": 0, "rollbacks": 0, "refused_updates": 0}
        self._verdict: Verdict | None = None
        self._version = 0

    def look(self) -> Status:
        path = self._folder / "events.jsonl"
        with explained(path, "read"), path.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # half written
                self._offset += len(line)
                self._take(line)
        figures = self._tally.figures()
        if not figures.total.rounds and self._others:
            raise RunFolderError(
                f"{self._folder} has no round of the arm {self._arm!r} yet; there are "
                f"{', '.join(sorted(self._others))}: name one with --arm"
            )
        recent = figures.recent.acceptance_length
        return Status(
            algorithm="experiment",
            adapting=self._version > 0 or self._known["updates"] > 0,
            failure=None,
            warning=None,
            draft_version=self._version,
            rounds=int(figures.total.rounds),
            acceptance_length=figures.total.acceptance_length,
            recent_acceptance_length=recent or 0.0,
            skipped_steps=0,
            starved_decisions=0,
            update_seconds=0.0,
            background_seconds=0.0,
            publish_seconds=0.0,
            draft_seconds=0.0,
            verify_seconds=0.0,
            last_loss=self._known.get("last_loss"),
            updates=self._known["updates"],
            rollbacks=self._known["rollbacks"],
            refused_updates=self._known["refused_updates"],
            frozen_acceptance_length=self._frozen(recent),
            alarms=alarms(figures),
            figures=figures,
        )

    def _take(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
            if event.arm != self._arm:
                if event.arm is not None and event.kind == "round":
                    self._others.add(event.arm)
            elif event.kind == "round":
                self._tally.observe(msgspec.json.decode(event.row, type=RoundRow))
            elif event.kind == "update":
                self._update(msgspec.json.decode(event.result, type=_Losses))
            elif event.kind == "verdict":
                self._judged(msgspec.json.decode(event.verdict, type=Verdict))
            elif event.kind == "publication":
                version = msgspec.json.decode(event.version, type=WeightVersion)
                self._version = version.version
            elif event.kind == "rollback":
                self._known["rollbacks"] += 1
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return  # another version's, or damaged: the report counts these

    def _update(self, result: _Losses) -> None:
        self._known["updates"] += 1
        self._known["last_loss"] = result.losses[-1] if result.losses else None

    def _judged(self, verdict: Verdict) -> None:
        self._verdict = verdict if verdict.serving_score else self._verdict
        self._known["refused_updates"] += bool(
            verdict.candidate_score and verdict.action != "publish"
        )

    def _frozen(self, recent: float | None) -> float | None:
        """As ``frozen_length`` of a server, from the newest verdict alone."""
        if recent is None or self._version == 0:
            return recent
        verdict = self._verdict
        if verdict is None or not verdict.loaded_score or not verdict.serving_score:
            return None
        return max(1.0, recent * verdict.loaded_score / verdict.serving_score)


class _Losses(msgspec.Struct):
    """Of an ``UpdateResult``; null is JSON's word for a loss that was not finite."""

    losses: list[float | None]
