"""Faults for the tests: a plugin of SGLang's that changes one thing in a scheduler process.

``COSCHED_TEST_FAULT`` names it. Inert without; never installed with cosched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from typing import Any


def install() -> None:
    fault = os.environ.get("COSCHED_TEST_FAULT")
    if fault:
        FAULTS[fault]()


def _trainer_raises() -> None:
    """The third update raises."""
    from cosched.training.deepspeed_trainer import DeepSpeedTrainer

    update, calls = DeepSpeedTrainer.update, count(1)

    def broken(self: Any, *args: Any) -> Any:
        if next(calls) >= 3:
            raise RuntimeError("the trainer broke")
        return update(self, *args)

    DeepSpeedTrainer.update = broken


def _gradient_is_nan() -> None:
    """The loss of steps 3 and 4 is a number, its gradient is not."""
    from cosched.training.micro_step import BatchLoss

    forward, calls = BatchLoss.forward, count(1)

    def broken(self: Any, batch: Any) -> Any:
        loss = forward(self, batch)
        if next(calls) in {3, 4}:
            weight = next(p for p in self.network.parameters() if p.requires_grad)
            loss = loss + (weight.sum() * 0).sqrt()
        return loss

    BatchLoss.forward = broken


def _nothing_to_train_on() -> None:
    """The replay buffer never has a row."""
    from cosched.loop.replay import ReplayBuffer

    ReplayBuffer.sample = lambda _self: None


def _length_by_load() -> None:
    """Three tokens are drafted for one request, one for each of two, none for more."""
    from schedulers.length import Goodput

    def choose(_self: Any, snapshot: Any) -> int:
        return {1: 3, 2: 1}.get(snapshot.num_running, 0)

    Goodput.choose = choose


def _length_breaks() -> None:
    """The policy of lengths raises from the tenth round on."""
    from schedulers.length import Goodput

    calls = count(1)

    def broken(_self: Any, snapshot: Any) -> int:
        if next(calls) >= 10:
            raise KeyError("the policy broke")
        return snapshot.round_index % 4

    Goodput.choose = broken


def _wrong_checksum() -> None:
    """At the third publication the draft's bits are not those that were published."""
    from cosched.loop import publish

    prove, calls = publish.InPlacePublisher._prove, count(1)

    def broken(self: Any, weights: Any, *others: Any) -> str:
        if next(calls) == 3:
            name = next(iter(weights))
            self._serving.draft[name].flatten()[0] += 1
        return prove(self, weights, *others)

    publish.InPlacePublisher._prove = broken


def _worker_looks_wrong() -> None:
    """What a worker takes off a verification raises, from the tenth on."""
    from cosched.engines.sglang.worker.collector import RoundCollector

    verified, calls = RoundCollector.verified, count(1)

    def broken(self: Any, one: Any) -> None:
        if next(calls) >= 10:
            raise IndexError("the tap broke")
        verified(self, one)

    RoundCollector.verified = broken


def _ranks_differ() -> None:
    """From the third update on, rank 1 trains on something else."""
    import torch.distributed as dist

    from cosched.training.deepspeed_trainer import DeepSpeedTrainer

    weights, calls = DeepSpeedTrainer.weights, count(1)

    def broken(self: Any) -> Any:
        found = dict(weights(self))
        if dist.get_rank() == 1 and next(calls) >= 3:  # asked once an update, to publish it
            name = next(iter(found))
            found[name] = found[name] + 1e-3
        return found

    DeepSpeedTrainer.weights = broken


def _one_rank_breaks() -> None:
    """Rank 1 fails on its own, between two updates."""
    import torch.distributed as dist

    from cosched.loop.replay import ReplayBuffer

    collect, calls = ReplayBuffer.collect, count(1)

    def broken(self: Any, round_: Any) -> int:
        if dist.get_rank() == 1 and next(calls) == 11:
            raise MemoryError("rank 1 broke")
        return collect(self, round_)

    ReplayBuffer.collect = broken


def _compare_instead_of_training() -> None:
    """Where an update was due, the draft replays what it served.

    For losses the result has counts of rows: missed in requests that were seen from their first
    token, missed in all, rows where the teacher agrees, and rows of requests seen whole.
    """
    import torch

    from cosched.records import UpdateResult
    from cosched.training.deepspeed_trainer import DeepSpeedTrainer

    @torch.no_grad()
    def compare(self: Any, batch: Any, _decision: Any) -> UpdateResult:
        module = self.batch_loss
        best_RNK = module._drafter.replay(batch).argmax(-1)
        ids = module._drafter.target_ids()
        if ids is not None:
            best_RNK = ids[best_RNK]
        served = batch.weights_RNK > 0
        whole = served & (batch.starts_R == 0)[:, None, None]  # others: a cached prefix is missing
        missed = best_RNK != batch.paths_RNK
        teacher = module.teacher_logits(batch).argmax(-1)  # row k says what stands at place k
        counts = (missed & whole, missed & served, (teacher == batch.paths_RNK) & served, whole)
        # A step that was skipped is not published: the draft stays as it is.
        return UpdateResult(
            num_steps=1,
            num_skipped=1,
            losses=tuple(float(count.sum()) for count in counts),
            num_rows=int(served.sum()),
            seconds=0.0,
        )

    DeepSpeedTrainer.update = compare


FAULTS: dict[str, Callable[[], None]] = {
    "trainer": _trainer_raises,
    "gradient": _gradient_is_nan,
    "starve": _nothing_to_train_on,
    "length by load": _length_by_load,
    "length": _length_breaks,
    "checksum": _wrong_checksum,
    "fidelity": _compare_instead_of_training,
    "tap": _worker_looks_wrong,
    "ranks": _ranks_differ,
    "rank": _one_rank_breaks,
}
