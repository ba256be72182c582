"""The walk of a round, which the engine drives: read ``Coscheduler.on_round`` first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cosched.errors import PublicationError
from cosched.loop.counters import Counters
from cosched.loop.meter import Meter
from cosched.records import KEEP, NOTHING, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.loop.roles import Buffer, Decider, Guard, Publisher, Sink, Trainer
    from cosched.records import Decision, Snapshot, UpdateResult, VerifyRound


@dataclass(eq=False)
class Coscheduler:
    """Turns verification rounds into better drafts, and never touches the target.

    Without a trainer the draft learns by itself: rounds are counted, and that is all.
    """

    buffer: Buffer
    policy: Decider
    trainer: Trainer | None
    guard: Guard
    publisher: Publisher | None
    sink: Sink
    reset_when_finished: bool
    clock: Callable[[], float] = time.perf_counter
    counters: Counters = field(default_factory=Counters, init=False)
    learning: bool = field(default=True, init=False)  # off: rounds are counted, and nothing else

    def __post_init__(self) -> None:
        self._meter = Meter(self.clock)

    def on_round(self, round_: VerifyRound) -> None:
        """One walk, after a round, a prefill, or a tick in which nothing ran."""
        self.collect(round_)
        snapshot = self.observe(round_)
        decision = self.decide(snapshot)
        result = self.update(decision)
        verdict = self.judge(round_, snapshot, result)
        self.publish(verdict)
        self.counters.beside = self.busy

    def collect(self, round_: VerifyRound) -> None:
        """Keep its rows; who has finished is known also while nothing is learnt."""
        if self.trainer is not None:
            kept = round_ if self._learner else replace(round_, segments=(), blocks=())
            self.counters.evicted += self.buffer.collect(kept)

    def observe(self, round_: VerifyRound) -> Snapshot:
        """Count it: all that a policy may know, in numbers."""
        standing = self.guard.standing
        self.counters.observe(round_, standing)
        self.guard.observe(round_, self.counters.serves_loaded)
        kept, forgets = self.buffer.num_tokens, self.reset_when_finished
        return self.counters.snapshot(round_.num_running, self.version, kept, standing, forgets)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Whether to train now, and how: the policy's word, where it can be followed."""
        if self._learner is None or self.busy:
            return NOTHING
        with self._meter:
            return self.policy.decide(snapshot)

    def update(self, decision: Decision) -> UpdateResult | None:
        """Micro-steps on the trainer's own copy; None while none is done."""
        if self._learner is None:
            return None
        under_way = self._learner.busy
        with self._meter:
            result = self._learner.finished() if under_way else self._begin(self._learner, decision)
        seconds = self._meter.take()
        if result or self._learner.busy > under_way:  # to decline is free
            self.counters.update_seconds_total += seconds
        if result:
            self.counters.note_update(result, in_background=under_way)
            self.sink.emit("update", round=self.counters.rounds, result=result)
        return result

    def judge(self, round_: VerifyRound, seen: Snapshot, result: UpdateResult | None) -> Verdict:
        """What is to become of the candidate and of what serves: the guard's word."""
        if self._learner is None:
            return KEEP
        if self.reset_when_finished and round_.finished:
            return self._forget()
        if self._learner.busy:
            return KEEP  # the copy is in use
        with self._meter:
            verdict = self.guard.judge(result, seen, self._learner.weights)
        seconds = self._meter.take()
        if verdict.reason or self.guard.busy:
            self.counters.note_look(seconds)
        if verdict.reason:
            self.counters.note_verdict(verdict, self.version)
            self.sink.emit("verdict", round=self.counters.rounds, verdict=verdict, seconds=seconds)
        return verdict

    def publish(self, verdict: Verdict) -> None:
        """Do it: here alone weights begin to serve, and here alone training goes back."""
        if verdict.action == "publish" and self.trainer is not None:
            self.counters.published()
            self._serve(self.trainer.weights())
        elif verdict.to is not None:
            self._go_back(verdict.to, verdict.reason)

    def roll_back(self, version: int) -> int:
        """Serve an earlier version's weights, as the next version, and go on learning from there.

        Raises:
            PublicationError: that version is not kept, or this draft is never published.
        """
        if self.publisher is None:
            raise PublicationError("this draft is not trained here: it has no versions")
        self.publish(Verdict("roll_back", "asked for", to=version))
        if self.version == version:  # again: who asked sees by the number that it was done
            self._serve(self.publisher.weights_of(version))
        self.guard.start_anew(self.counters.rounds)
        self.counters.rolled_back += 1
        return self.version

    @property
    def version(self) -> int:
        return self.publisher.version if self.publisher else 0

    @property
    def busy(self) -> bool:
        """Whether something goes on beside the decoding: an update, or a look at what came of one."""
        return self.trainer is not None and (self.trainer.busy or self.guard.busy)

    @property
    def _learner(self) -> Trainer | None:
        return self.trainer if self.learning else None

    def state(
        self, trains: bool = True, with_rows: bool = False
    ) -> tuple[Counters, int, Mapping[str, Tensor]]:
        """What a later run goes on from; only what serves, if the trainer is lost and not ``trains``."""
        if self.trainer is None or self.publisher is None:
            return self.counters, self.version, {}
        own = {**self.trainer.state()} if trains else {}
        own |= self.buffer.state() if with_rows else {}
        return self.counters, self.version, {**own, **self.publisher.state(), **self.guard.state()}

    def restore(
        self, counters: Counters, version: int, tensors: Mapping[str, Tensor], trains: bool = True
    ) -> None:
        """Go on from an earlier run's ``state()``."""
        self.counters = counters
        self.buffer.restore(tensors)
        if self.trainer is not None and self.publisher is not None and counters.updates:
            self.publisher.restore(tensors, version)
            self.guard.restore(tensors)
            serving = self.publisher.weights_of(version)
            self.trainer.restore(tensors) if trains else self.trainer.load(serving)

    def _begin(self, trainer: Trainer, decision: Decision) -> UpdateResult | None:
        batch = self.buffer.sample() if decision.num_steps else None
        if batch is None:
            self.counters.starved += decision.num_steps > 0
            return None
        self.counters.begin_update(decision.num_steps)
        self.sink.emit("decision", round=self.counters.rounds, decision=decision)
        return trainer.update(batch, decision)  # None: it goes on in the background

    def _forget(self) -> Verdict:
        """State per request: the next one starts from the draft as it was loaded, and anew."""
        self.guard.request_ended(self.counters.rounds)
        if not (self.counters.start_anew() or self.busy):
            return KEEP  # it has learnt nothing
        self.sink.emit("reset", round=self.counters.rounds)
        return Verdict("roll_back", "its request has ended", to=0)

    def _go_back(self, version: int, reason: str) -> None:
        assert self.trainer is not None
        assert self.publisher is not None
        serving, weights = self.version, self.publisher.weights_of(version)
        with self._meter:
            self.trainer.load(weights) if version else self.trainer.reset()
        self.counters.update_seconds_total += self._meter.take()
        self.counters.went_back(version, serving)
        if version != serving:
            self.sink.emit("rollback", round=self.counters.rounds, to=version, reason=reason)
            self._serve(weights)

    def _serve(self, weights: Mapping[str, Tensor]) -> None:
        assert self.publisher is not None
        version = self.publisher.publish(weights)
        self.counters.publish_seconds += version.seconds
        self.sink.emit("publication", round=self.counters.rounds, version=version)
