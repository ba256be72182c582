"""An arm of the tiny world whose rounds go the way that a server's go: counted, and looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cosched.build.embedded import Arm, World, build_arm
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.engines.sglang.worker.operator import NullOperator, Status
from cosched.records import RoundRow, VerifyRound
from cosched.telemetry.run_folder import NoEvents
from cosched.telemetry.tally import Tally
from cosched.training.ranks import Ranks


class Watched:
    """``alarms`` says after how many request rounds each alarm first came, ``statuses`` how it stood.

    ``before_round`` may do something to the arm, with how many request rounds there have been.
    """

    def __init__(
        self,
        world: World,
        name: str = "adapted",
        before_round: Callable[[int], None] = lambda _n: None,
        look_every: int = 16,
    ) -> None:
        self.arm: Arm = build_arm(world, name, NoEvents())
        self.alarms: dict[str, int] = {}
        self.statuses: list[tuple[int, Status]] = []
        self.count = 0
        self._world = world
        self._before_round = before_round
        self._look_every = look_every
        self._tally = Tally(lambda: 0.0)
        coscheduler: Any = self.arm.coscheduler
        self.coscheduler = coscheduler
        self.adaptation = Adaptation(
            algorithm="COSCHED_EAGLE3", coscheduler=coscheduler, collector=RoundCollector(),
            ranks=Ranks(0, [0], torch.device("cpu")), watches=True, window=64,
            save=lambda _path: None, operator=NullOperator(), sink=NoEvents(), tally=self._tally,
        )  # fmt: skip
        self.arm.engine._observer = self  # in the place of the co-scheduler

    def decode(self) -> None:
        for _ in self.arm.engine.generate(self._world.requests):
            pass

    @property
    def version(self) -> int:
        return self.coscheduler.version

    def on_round(self, round_: VerifyRound) -> None:
        """What the engine calls; a worker of SGLang's is told the same in three calls."""
        self._before_round(self.count)
        for block in round_.blocks:
            drafted, accepted = len(block.path_K), block.num_accepted
            version = self.coscheduler.version
            self._tally.observe(
                RoundRow(block.request_id, 0, version, drafted, accepted, block.num_committed)
            )
        self.adaptation._ready.append(round_)
        self.adaptation.step(round_.num_running)
        before, self.count = self.count, self.count + len(round_.blocks)
        if self.count // self._look_every > before // self._look_every:
            status = self.adaptation.status()
            self.statuses.append((self.count, status))
            for name in status.alarms:
                self.alarms.setdefault(name, self.count)
