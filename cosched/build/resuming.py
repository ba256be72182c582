"""From a saved state to a co-scheduler that goes on where it was, if it is of the same learning."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.loop.checksum import checksum
from cosched.loop.learner_state import Origin, read_state, read_tensors
from cosched.settings.learning import check_same_learning, learning_settings

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.coscheduler import Coscheduler
    from cosched.loop.publish import InPlacePublisher
    from cosched.settings.schema import Config

logger = logging.getLogger("cosched")


def origin_of(config: Config, publisher: InPlacePublisher, num_ranks: int) -> Origin:
    """What a state that is saved here can be gone on from with."""
    return Origin(
        target=publisher.target_checksum(),
        draft=checksum(publisher.weights_of(0)),
        num_ranks=num_ranks,
        settings=learning_settings(config),
    )


def go_on(coscheduler: Coscheduler, path: Path, origin: Origin, rank: int) -> None:
    """Put a new co-scheduler where the saved one was.

    Raises:
        ConfigError: that was of another target, draft or learning.
        RunFolderError: it cannot be read.
    """
    state = read_state(path)
    _check_same(state.origin, origin, path)
    tensors = read_tensors(path, rank if state.trains else 0)
    coscheduler.restore(state.counters, state.version, tensors, state.trains)
    coscheduler.sink.emit("resume", round=state.counters.rounds, version=state.version)
    logger.info("cosched goes on from %s, version %d of the draft", path, state.version)


def _check_same(was: Origin, now: Origin, path: Path) -> None:
    check_same_learning(was.settings, now.settings, str(path))
    if was.num_ranks != now.num_ranks:
        raise ConfigError(
            f"engine.arguments.tp_size: {was.num_ranks} ranks learnt what is saved in {path}, now "
            f"there are {now.num_ranks}"
        )
    for key, old, new in (
        ("target.path", was.target, now.target),
        ("drafter.path", was.draft, now.draft),
    ):
        if old != new:
            raise ConfigError(
                f"{key}: what is saved in {path} was learnt with other weights (checksum {old}) than "
                f"are there now ({new}); name those, or start without --resume"
            )
