"""The trackers of a run: each arm's curves, on top of one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.loop.tee import Tee
from cosched.telemetry.trackers.curves import Curves
from cosched.telemetry.trackers.opening import open_trackers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cosched.engines.embedded.engine import OnRow
    from cosched.loop.roles import Sink
    from cosched.runs.summary import Running
    from cosched.settings.schema import Config


class Tracking:
    """Curves by the names of the arms; none where ``run.trackers`` names no tracker."""

    def __init__(self, config: Config) -> None:
        self._names = config.run.trackers
        self._curves = {
            arm: Curves(config.for_arm(arm).adapt.trainer.lr, by_turns=True)
            for arm in config.arms
            if config.run.trackers
        }

    def sink_of(self, arm: str, events: Sink) -> Sink:
        """What takes the arm's events."""
        return Tee(events, self._curves[arm]) if arm in self._curves else events

    def on_row(self, arm: str) -> OnRow | None:
        """What is told of its rounds when they are committed; None where nobody wants to know."""
        return self._curves[arm].observe if arm in self._curves else None

    def open(self, folder: Path, running: Iterable[Running]) -> None:
        """Before anything is decoded; what a run that is resumed has drawn up to here stays."""
        for one in running:
            name, curves = one.arm.name, self._curves.get(one.arm.name)
            if curves is None:
                continue
            curves.learner = one.arm.coscheduler
            done = sum(len(log.rounds) for log in one.logs)
            curves.open(open_trackers(self._names, folder, name, done), done)

    def close(self) -> None:
        """Nothing is decoded any more."""
        for curves in self._curves.values():
            curves.close()
