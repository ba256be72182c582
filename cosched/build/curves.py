"""From a configuration to the curves of what runs until it is told to end: a server, or a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.telemetry.trackers.curves import Curves
from cosched.telemetry.trackers.opening import open_trackers

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.settings.schema import Config


def build_curves(config: Config, folder: Path, name: str) -> Curves | None:
    """Curves that trackers draw in ``folder`` as ``name``; None where ``run.trackers`` names no tracker."""
    run = config.run
    if not run.trackers:
        return None
    curves = Curves(config.adapt.trainer.lr, by_turns=False)
    curves.open(open_trackers(run.trackers, folder, name))
    return curves
