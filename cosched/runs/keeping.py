"""When a run saves what it can be gone on from: behind a group of requests, as ``adapt.checkpoint`` says."""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosched.build.embedded import Arm
from cosched.errors import ConfigError
from cosched.loop.checksum import checksum
from cosched.records import IDLE_TICK
from cosched.runs import resume
from cosched.runs.resume import ArmProgress, Progress
from cosched.settings.sections import CheckpointSettings
from cosched.training.process import LostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from cosched.build.embedded import World
    from cosched.coscheduler import Coscheduler
    from cosched.loop.counters import Counters
    from cosched.loop.per_adapter import CoschedulerPool
    from cosched.runs.resume import RunOrigin, Tensors
    from cosched.runs.summary import Running
    from cosched.settings.schema import Config
    from cosched.sidecar.follower import Follower
    from cosched.telemetry.run_folder import RunFolder

    Learner = Coscheduler | CoschedulerPool | Follower

IDLE_SECONDS = 0.001  # between two ticks


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run can be gone on from: copies, to which nothing is added any more."""

    progress: Progress
    tensors: Tensors


class Keeping:
    """Keeps points of a run; no other process can write into its folder meanwhile.

    A point that is not due is held in memory, where one is to be saved ``at_end``: an end in the middle of
    a group then loses that group and no more.

    Raises:
        RunFolderError: another process runs there, or it cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: CheckpointSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._states = resume.states_of(folder, settings.keep)
        self._states.hold()
        self._unsaved: Point | None = None
        self._updates: Mapping[str, int] | None = None  # of each arm, when the newest was saved
        self._saved_at = clock()

    def start_from(self, updates: Mapping[str, int]) -> None:
        """So many updates of each arm are in what is saved already."""
        self._updates = updates

    def behind_group(self, updates: Mapping[str, int], point: Callable[[], Point]) -> None:
        """No request is running; the arms have taken so many updates.

        Raises:
            RunFolderError: the disk refuses; what was saved before is still there.
        """
        due = self._due(updates)
        if due or self._settings.at_end:
            self._unsaved = point()
        if due:
            self._save()
            self._updates, self._saved_at = updates, self._clock()

    def interrupted(self) -> None:
        """The run ends in the middle of a group.

        Raises:
            RunFolderError: as above.
        """
        if self._settings.at_end:
            self._save()

    def close(self) -> None:
        """Nothing is kept any more; another process may run there."""
        self._states.let_go()

    def _save(self) -> None:
        if self._unsaved is not None:
            resume.save(self._states, self._unsaved.progress, self._unsaved.tensors)
            self._unsaved = None

    def _due(self, updates: Mapping[str, int]) -> bool:
        own = self._settings
        if self._updates is None or (own.every_updates is None and own.every_minutes is None):
            return True
        most = max((number - self._updates[arm] for arm, number in updates.items()), default=0)
        return own.due(most, self._clock() - self._saved_at)


def check_kept(config: Config, record: bool) -> None:
    """Refuse to be told when to save where nothing of a run is saved.

    Raises:
        ConfigError: ``adapt.checkpoint`` says when, and this run begins anew whenever it is interrupted.
    """
    if config.adapt.checkpoint == CheckpointSettings():
        return
    if config.engine.kind == "sglang":
        why, use = "arms on SGLang begin", "use engine.kind: embedded"
    elif record:
        why, use = "a recording begins", "run without --record"
    else:
        return
    raise ConfigError(
        f"adapt.checkpoint: {why} anew when it is interrupted, so nothing of it is saved; leave it "
        f"out, or {use}"
    )


def point_of(running: Sequence[Running], groups_done: int, events: int, origin: RunOrigin) -> Point:
    """Where the arms are; ``events`` bytes of the log are written by now."""
    arms: dict[str, ArmProgress] = {}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for one in running:
        counters, version = None, 0
        if isinstance(one.arm, Arm) and one.arm.coscheduler is not None:
            counters, version, tensors[one.arm.name] = _state_of(one.arm.coscheduler)
        arms[one.arm.name] = ArmProgress(
            list(one.logs),
            one.wall_seconds,
            copy.copy(one.arm.engine.seconds),
            copy.deepcopy(counters),
            version,
            list(one.turns),
        )
    return Point(Progress(groups_done, events, arms, origin), tensors)


def _state_of(learner: Learner) -> tuple[Counters, int, Mapping[str, Tensor]]:
    """What a later run goes on from; a process that trains and was lost just now is waited for."""
    while True:
        try:
            return learner.state(with_rows=True)
        except LostError:
            settle(learner)


def settle(learner: Learner) -> None:
    """No request runs any more, and nobody waits: let what goes on beside the decoding end.

    Raises:
        TrainingError: what trains is lost, and has been started again often enough.
    """
    while learner.busy:
        time.sleep(IDLE_SECONDS)
        learner.on_round(IDLE_TICK)


def put_back(
    running: Sequence[Running], progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put new arms where those of the point were."""
    for one in running:
        kept = progress.arms[one.arm.name]
        one.logs, one.wall_seconds, one.turns = kept.logs, kept.wall_seconds, kept.turns
        one.arm.engine.seconds = kept.engine_seconds
        learner = one.arm.coscheduler if isinstance(one.arm, Arm) else None
        if learner is not None and kept.counters is not None:
            learner.restore(kept.counters, kept.version, tensors.get(one.arm.name, {}))


def updates_of(running: Sequence[Running]) -> dict[str, int]:
    """How many updates each arm that learns has taken."""
    learning = {one.arm.name: one.arm.coscheduler for one in running}
    return {name: one.counters.updates for name, one in learning.items() if one is not None}


def origin_of(world: World, running: Sequence[Running]) -> RunOrigin:
    """What this run began with; to be asked before anything is decoded."""
    drafts: dict[str, str] = {}
    for one in running:
        if one.arm.drafter is not None and (network := one.arm.drafter.network()) is not None:
            drafts[one.arm.name] = checksum(dict(network.named_parameters()))
    # A trace has its target's checksum, which was compared when it was loaded.
    target = world.target.checksum() if world.trace is None else world.trace.target_checksum
    return resume.RunOrigin(target, _text_checksum(world), drafts)


def _text_checksum(world: World) -> str:
    digest = hashlib.sha256()
    for request in world.requests:
        said = request.prompt_P if request.forced_T is None else request.forced_T
        digest.update(f"{request.id} {len(request.prompt_P)} {said.tolist()}".encode())
    if world.trace is None:  # files have what a conversation goes on to ask, too
        for path in world.config.workload.files.values():
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
