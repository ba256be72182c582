"""How an adaptation stands, in the figures that operators see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosched.engines.sglang.worker.operator import Status
from cosched.sidecar.follower import Follower
from cosched.telemetry.alarms import alarms

if TYPE_CHECKING:
    from cosched.coscheduler import Coscheduler
    from cosched.loop.counters import Counters
    from cosched.records import GuardFigures
    from cosched.telemetry.tally import Figures

STATM = Path("/proc/self/statm")  # Linux


def status_of(
    coscheduler: Coscheduler | Follower,
    figures: Figures,
    *,
    algorithm: str,
    adapting: bool,
    failure: str | None,
    warning: str | None,
    num_running: int,
    rounds_by_drafted: tuple[int, ...],
) -> Status:
    """The status of a co-scheduler whose rounds have been counted into ``figures``.

    With a trainer elsewhere rows and guard are there.
    """
    counters = coscheduler.counters
    own = None if isinstance(coscheduler, Follower) else coscheduler
    guard = own.guard.figures(counters.serves_loaded) if own else None
    # Each verified block commits one token more than it accepts.
    blocks = counters.committed - counters.accepted
    losses = counters.losses
    return Status(
        algorithm=algorithm,
        adapting=adapting,
        failure=failure,
        warning=warning,
        draft_version=coscheduler.version,
        rounds=counters.rounds,
        acceptance_length=counters.committed / blocks if blocks else None,
        recent_acceptance_length=counters.recent,
        updates=counters.updates,
        skipped_steps=counters.skipped_steps,
        starved_decisions=counters.starved,
        update_seconds=counters.update_seconds_total,
        background_seconds=counters.background_seconds,
        publish_seconds=counters.publish_seconds,
        draft_seconds=counters.draft_seconds,
        verify_seconds=counters.verify_seconds,
        last_loss=losses[-1] if losses else None,
        refused_updates=counters.refused,
        rollbacks=counters.rolled_back,
        guard_seconds=counters.guard_seconds,
        evicted_requests=counters.evicted,
        dropped_rounds=counters.dropped,
        rounds_by_drafted=rounds_by_drafted,
        frozen_acceptance_length=frozen_length(counters, guard),
        reference_acceptance_length=counters.reference,
        round_seconds=counters.round_seconds,
        num_running=num_running,
        num_queued=counters.queued,
        replay_tokens=own.buffer.num_tokens if own else 0,
        replay_bytes=own.buffer.num_bytes if own else 0,
        replay_max_bytes=own.buffer.max_bytes if own else 0,
        resident_bytes=_resident_bytes(),
        device_bytes=torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0,
        alarms=alarms(figures, guard, failure, warning),
        guard=guard,
        figures=figures,
    )


def frozen_length(counters: Counters, guard: GuardFigures | None) -> float | None:
    """What the draft as loaded would have where the recent length is that of what serves.

    Scores are of every place of the text, rounds begin where the one before ended, mostly at a token
    that is hard to guess; the ratio of two scores on the same rows is free of that. No length is below 1,
    also where what serves does far worse than it was scored.
    """
    if not counters.rounds:
        return None
    if counters.serves_loaded:
        return counters.recent
    if guard is None or guard.serving_score is None or guard.loaded_score is None:
        return None
    return max(1.0, counters.recent * guard.loaded_score / guard.serving_score)


def _resident_bytes() -> int:
    """Of this process in memory; 0 where the system does not say."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
