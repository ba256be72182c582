"""Trackers by the names that ``run.trackers`` has: whether they are installed, and how they are opened."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.telemetry.trackers.tensorboard import TensorBoard
from cosched.telemetry.trackers.wandb import WeightsAndBiases
from cosched.telemetry.trackers.writing import Trackers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def check_installed(names: Iterable[str]) -> None:
    """Make sure that the packages of these trackers are there; they have their names.

    Raises:
        ConfigError: one is not; the message has the command that installs it.
    """
    for place, name in enumerate(names):
        if find_spec(name) is None:
            raise ConfigError(
                f"run.trackers[{place}]: the package {name} is not installed: "
                f"pip install 'cosched[trackers]'"
            )


def open_trackers(names: Iterable[str], folder: Path, arm: str, done: int = 0) -> Trackers:
    """Trackers of one arm of a run, which has had ``done`` steps already."""
    openers = {
        "tensorboard": lambda: TensorBoard(folder, arm, done),
        "wandb": lambda: WeightsAndBiases(folder, arm),
    }
    return Trackers({name: openers[name] for name in names})
