"""What ``cosched serve --resume`` goes on from: the newest saved state of the server's earlier starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cosched.errors import ConfigError, RunFolderError
from cosched.loop.learner_state import read_state
from cosched.settings.learning import check_same_learning, learning_settings
from cosched.telemetry.run_folder import explained
from cosched.telemetry.saved_states import SavedStates

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.settings.schema import Config

STATES = "state"  # in the folder of the start that learning began with

logger = logging.getLogger("cosched")


def state_to_resume(config: Config) -> Path | None:
    """The newest state below the run folder that is whole; None where none was ever saved.

    A start that has learnt nothing is passed over, and so is one whose states are damaged, which is
    said. Who goes on writes into the same folder, so that it stays as large as it is.

    Raises:
        RunFolderError: all that was saved is damaged.
        ConfigError: it was learnt with other settings, or what is learnt is a trainer's elsewhere.
    """
    if config.adapt.placement == "sidecar":
        raise ConfigError(
            "--resume: with adapt.placement = sidecar the trainer saves what is learnt; give it to "
            "cosched train"
        )
    damaged: RunFolderError | None = None
    for states in _saved(config.run_folder.absolute()):
        try:
            state = states.newest()
        except RunFolderError as error:
            damaged = error
            continue
        if state is not None:
            was = read_state(state).origin.settings
            check_same_learning(was, learning_settings(config), str(state))
            return state
    if damaged is not None:
        raise RunFolderError(f"--resume: {damaged}; start without it, or with another run.name")
    logger.warning(
        "cosched: nothing to resume in %s yet; the draft starts as loaded", config.run_folder
    )
    return None


def _saved(folder: Path) -> list[SavedStates]:
    """What the starts below a run folder have saved, the newest first."""
    with explained(folder, "read"):
        found = [SavedStates(path) for path in folder.glob(f"*/{STATES}")]
        return sorted(found, key=lambda states: states.saved_at, reverse=True)
