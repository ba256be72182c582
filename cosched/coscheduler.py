"""The walk of a round: six steps, in this order. Read ``Coscheduler.on_round`` first.

The engine drives: it calls ``on_round`` after every round and every prefill, and when it idles.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cosched.errors import PublicationError
from cosched.loop.counters import Counters
from cosched.loop.meter import Meter
from cosched.records import Decision, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.protocols import Buffer, Guard, Policy, Publisher, Sink, Trainer
    from cosched.records import Snapshot, UpdateResult, VerifyRound

NOTHING = Decision(num_steps=0)
KEEP = Verdict("keep")


class Coscheduler:
    """Turns verification rounds into better drafts, and never touches the target.

    Without a trainer the draft learns by itself: rounds are counted, the policy is not asked and
    nothing is kept of them.
    """

    def __init__(
        self,
        buffer: Buffer,
        policy: Policy,
        trainer: Trainer | None,
        guard: Guard,
        publisher: Publisher | None,
        sink: Sink,
        reset_when_finished: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._buffer = buffer
        self._policy = policy
        self._trainer = trainer
        self._guard = guard
        self._publisher = publisher
        self._sink = sink
        self._reset_when_finished = reset_when_finished
        self._meter = Meter(clock)
        self.counters = Counters()
        self.learning = True  # off: rounds are counted, nothing is kept and nothing is trained

    def on_round(self, round_: VerifyRound) -> None:
        """One walk, after a round, a prefill, or a tick in which nothing ran."""
        self.collect(round_)
        snapshot = self.observe(round_)
        decision = self.decide(snapshot)
        result = self.update(decision)
        verdict = self.judge(round_, snapshot, result)
        self.publish(verdict)

    def collect(self, round_: VerifyRound) -> None:
        """Keep the rows of a round; who has finished is known also while nothing is kept."""
        if self._trainer is not None:
            kept = round_ if self._learns else replace(round_, segments=(), blocks=())
            self._buffer.collect(kept)

    def observe(self, round_: VerifyRound) -> Snapshot:
        """Count it; all that policies may know, in numbers."""
        standing = self._guard.standing
        self.counters.observe(round_, standing.lead_tokens)
        self._guard.observe(round_, self.counters.serves_loaded)
        return self.counters.snapshot(
            round_.num_running, self.version, self._buffer.num_tokens, standing.resumes_at
        )

    def decide(self, snapshot: Snapshot) -> Decision:
        """Whether to train now, and how: the policy's word, where one can be carried out."""
        if not self._learns or self.busy:
            return NOTHING
        with self._meter:
            return self._policy.decide(snapshot)

    def update(self, decision: Decision) -> UpdateResult | None:
        """Micro-steps on the trainer's own copy; None while there is nothing new, or not yet.

        What is charged is what updates took, deciding included. To be asked and to decline costs
        the learner nothing: an idle server asks for hours, and would spend on it what it may spend
        on learning.
        """
        if not self._learns:
            return None
        under_way = self.busy
        with self._meter:
            result = self._trained(decision)
        seconds = self._meter.take()
        if result or (self.busy and not under_way):
            self.counters.update_seconds_total += seconds
        if result:
            self.counters.note_update(result, in_background=under_way)
            self._sink.emit("update", round=self.counters.rounds, result=result)
        return result

    def judge(
        self, round_: VerifyRound, snapshot: Snapshot, result: UpdateResult | None
    ) -> Verdict:
        """What is to become of the candidate and of what serves: the guard's word.

        State per request ends with it. While the trainer's copy is in use nothing is judged.
        """
        if not self._learns:
            return KEEP
        if self._reset_when_finished and round_.finished:
            return self._forget()
        if self._trainer is None or self._trainer.busy:
            return KEEP
        with self._meter:
            verdict = self._guard.judge(result, snapshot, self._trainer.weights)
        seconds = self._meter.take()
        if verdict.reason:
            self.counters.note_verdict(verdict, seconds, self.version)
            self._sink.emit("verdict", round=self.counters.rounds, verdict=verdict)
        return verdict

    def publish(self, verdict: Verdict) -> None:
        """Carry a verdict out. Here alone weights go into the serving draft, or training goes back."""
        if verdict.action == "publish":
            self.counters.published()
            self._serve()
        elif verdict.action == "roll_back":
            assert verdict.to is not None
            self._go_back(verdict.to, verdict.reason)

    def roll_back(self, version: int) -> int:
        """Serve an earlier version's weights, as the next version, and go on learning from there.

        Raises:
            PublicationError: that version is not kept, or this draft is never published.
        """
        if self._trainer is None:
            raise PublicationError("this draft is not trained here: it has no versions")
        serving = self.version
        self.publish(Verdict("roll_back", "asked for", to=version))
        if self.version == serving:
            self._serve()  # again, for who asked sees by the number that it was done
        self._guard.start_anew(self.counters.rounds)
        return self.version

    @property
    def version(self) -> int:
        return self._publisher.version if self._publisher else 0

    @property
    def busy(self) -> bool:
        """Whether an update goes on in the background, or waits to be judged."""
        return self._trainer is not None and self._trainer.busy

    @property
    def _learns(self) -> bool:
        return self._trainer is not None and self.learning

    def state(self) -> tuple[Counters, int, Mapping[str, Tensor]]:
        """Counters, draft version, trainer, versions and guard: what a later run goes on from.

        Valid while no request runs; what the replay buffer holds of a running one is not kept.
        """
        if self._trainer is None or self._publisher is None:
            return self.counters, self.version, {}
        parts = self._trainer.state(), self._publisher.state(), self._guard.state()
        return self.counters, self.version, {k: t for part in parts for k, t in part.items()}

    def restore(self, counters: Counters, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an earlier run's ``state()``."""
        self.counters = counters
        if self._trainer is not None and self._publisher is not None and counters.updates:
            self._trainer.restore(tensors)
            self._publisher.restore(tensors, version)
            self._guard.restore(tensors)

    # --- how the steps are done ----------------------------------------------------------------

    def _trained(self, decision: Decision) -> UpdateResult | None:
        """The result of what was decided, or of the update that goes on in the background."""
        assert self._trainer is not None
        if self._trainer.busy:
            return self._trainer.finished()
        if not decision.num_steps:
            return None
        batch = self._buffer.sample()
        if batch is None:
            self.counters.starved += 1
            return None
        self.counters.begin_update(decision.num_steps)
        self._sink.emit("decision", round=self.counters.rounds, decision=decision)
        return self._trainer.update(batch, decision)  # None: it goes on in the background

    def _forget(self) -> Verdict:
        """State per request: the next one starts from the draft as it was loaded, and anew."""
        learnt = self.counters.start_anew() or self.busy
        self._guard.start_anew(self.counters.rounds)
        if not learnt:
            return KEEP
        self._sink.emit("reset", round=self.counters.rounds)
        return Verdict("roll_back", "its request has ended", to=0)

    def _go_back(self, version: int, reason: str) -> None:
        assert self._trainer is not None
        assert self._publisher is not None
        serving, weights = self.version, self._publisher.weights_of(version)
        with self._meter:
            self._trainer.load(weights) if version else self._trainer.reset()
        self.counters.update_seconds_total += self._meter.take()
        self.counters.went_back(version, serving)
        if version != serving:
            self._sink.emit("rollback", round=self.counters.rounds, to=version, reason=reason)
            self._serve()

    def _serve(self) -> None:
        assert self._trainer is not None
        assert self._publisher is not None
        version = self._publisher.publish(self._trainer.weights())
        self.counters.publish_seconds += version.seconds
        self._sink.emit("publication", round=self.counters.rounds, version=version)
