"""Tensor-parallel ranks that must do the same thing in the same round.

Every rank collects the same rows and counts the same rounds, but clocks differ, and a failure may
hit one of them alone. What could differ is exchanged here, over the CPU group.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist

from cosched.errors import TrainingError

if TYPE_CHECKING:
    from cosched.loop.roles import Decider
    from cosched.records import Decision, Snapshot

PATIENCE = timedelta(seconds=60)  # after which a rank that waits for a lost one stops training


class PartedError(TrainingError):
    """Another rank has stopped training, so this one cannot go on."""


class Ranks:
    """The ranks of a tensor-parallel group, with process groups of their own.

    SGLang's own group is left alone: a rank that failed goes on serving in it, and what it sends
    there must never meet what another rank still sends to train. ``parted`` says that one of them is
    known to have stopped: from then on they do not meet.
    """

    def __init__(self, rank: int, members: list[int], device: torch.device) -> None:
        self.rank = rank
        self.size = len(members)
        self.parted = False
        self._first = members[0]
        self._group: Any = None
        self.together: Any = None  # groups of torch.distributed to train in: of all ranks,
        self.alone: Any = None  # and of this one
        if self.size > 1:
            self._group = dist.new_group(members, timeout=PATIENCE, backend="gloo")
            backend = "nccl" if device.type == "cuda" else "gloo"
            self.together = dist.new_group(members, timeout=PATIENCE, backend=backend)
            singles = [dist.new_group([member], backend=backend) for member in members]
            self.alone = singles[rank]

    def sync(self, well: bool, asked: bool, number: int = 0) -> tuple[bool, bool, int]:
        """Whether every rank is well, whether any was asked for something, and the first's number."""
        if self._group is not None:
            # The least of all numbers is that of the first rank where all others name the greatest.
            mine = number if self.rank == 0 else torch.iinfo(torch.int32).max
            flags = torch.tensor([well, not asked, mine], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=self._group)
            well, asked, number = bool(flags[0]), not flags[1], int(flags[2])
        self.parted = not well
        return well, asked, number

    def meet(self, asked: bool = False, number: int = 0) -> tuple[bool, int]:
        """Wait until every rank is here: whether any was asked for something, and the first's number.

        Raises:
            PartedError: one has stopped training instead.
        """
        well, asked, number = self.sync(True, asked, number)
        if not well:
            raise PartedError("another rank stopped training")
        return asked, number

    def part(self) -> None:
        """This rank stops training. The others learn of it when they meet next, wherever that is."""
        if not self.parted:
            self.parted = True
            with suppress(RuntimeError):  # they wait for something else, and not for ever
                self.sync(well=False, asked=False)

    def agree(self, text: str) -> bool:
        """Whether every rank has the same text."""
        return all(other == text for other in self.gather(text))

    def gather(self, mine: Any) -> list[Any]:
        """Everybody's, by rank."""
        if self._group is None:
            return [mine]
        others: list[Any] = [None] * self.size
        dist.all_gather_object(others, mine, group=self._group)
        return others

    def from_first(self, mine: Any) -> Any:
        """What rank 0 has."""
        if self._group is None:
            return mine
        box = [mine]
        dist.broadcast_object_list(box, src=self._first, group=self._group)
        return box[0]


def rank_and_size() -> tuple[int, int]:
    """Of this process among those that a launcher has started (``torchrun``, ``deepspeed``)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def started_ranks(device: torch.device) -> Ranks:
    """The ranks that a launcher has started, of which this process is one, or this process alone.

    Each has a GPU of its own, if the ``device`` is one.
    """
    rank, size = rank_and_size()
    if size == 1:
        return Ranks(0, [0], device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, list(range(size)), device)


class SamePolicy:
    """A policy whose decision is rank 0's: costs in the snapshot are those of one clock.

    What the update is made with goes by counts and scores, of which all ranks have the same. Before
    anything is decided they meet: one that could not keep a round is not waited for.
    """

    def __init__(self, policy: Decider, ranks: Ranks) -> None:
        self._policy = policy
        self._ranks = ranks

    def decide(self, snapshot: Snapshot) -> Decision:
        decision = self._policy.decide(snapshot)
        if self._ranks.size == 1:
            return decision
        self._ranks.meet()
        steps, rate = self._ranks.from_first((decision.num_steps, decision.learning_rate))
        return msgspec.structs.replace(decision, num_steps=steps, learning_rate=rate)
