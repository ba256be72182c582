"""The roles of the loop. Whoever has these methods can play them; nobody has to inherit.

What plugins play, drafters, losses, policies and objectives, is in ``cosched.protocols``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from cosched.records import (
        Decision,
        GuardFigures,
        SignalBatch,
        Snapshot,
        Standing,
        UpdateResult,
        Verdict,
        VerifyRound,
        WeightVersion,
    )


class Decider(Protocol):
    """Whom the co-scheduler asks whether to train: a policy, or what is wrapped around one."""

    def decide(self, snapshot: Snapshot) -> Decision: ...


class Buffer(Protocol):
    """What has been collected of the rounds, bounded."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Bytes that are reserved for the requests in it."""
        ...

    @property
    def max_bytes(self) -> int: ...

    def collect(self, round_: VerifyRound) -> int:
        """Keep its rows; how many requests had to go for want of room."""
        ...

    def sample(self) -> SignalBatch | None:
        """Rows to train on now; None while there are too few."""
        ...

    def held_out(
        self, num_anchors: int, once: bool = False, at_least: int = 1
    ) -> SignalBatch | None:
        """The newest rows that no sample has had; None while there are not ``at_least`` so many.

        What was given ``once`` is not given so again: evidence is made of new rows.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Rows of requests that have ended."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


class Trainer(Protocol):
    """Turns a batch into micro-steps on its own copy of the draft.

    It may take its time: then ``update`` returns None, ``busy`` is true until the result has been
    taken from ``finished``, and until then it is not given another batch.
    """

    @property
    def busy(self) -> bool: ...

    def update(self, batch: SignalBatch, decision: Decision) -> UpdateResult | None: ...

    def finished(self) -> UpdateResult | None:
        """The result of an update that took its time, once it is there."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The candidate: current values of the trained parameters, by name."""
        ...

    def reset(self) -> None:
        """Back to the first weights, with an empty optimizer, to the bit."""
        ...

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights, with an empty optimizer."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Everything that the next step depends on, in tensors that are nobody else's."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a ``state()``, to the bit."""
        ...


class Scorer(Protocol):
    """Says of weights what acceptance length they would have, without serving them.

    It may take its time, as a trainer may: then ``scores`` returns None, and ``busy`` is true until
    the scores have been taken from ``finished``, or nobody wants them any more.
    """

    @property
    def busy(self) -> bool: ...

    def scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[float]] | None:
        """Expected acceptance length of each, anchor by anchor of the batch."""
        ...

    def finished(self) -> list[list[float]] | None:
        """Scores that took their time, once they are there."""
        ...

    def forget(self) -> None:
        """Let go what is under way."""
        ...


class Guard(Protocol):
    """Whether a candidate may serve, and whether what serves may stay; it remembers by itself.

    It may take its time: while it is ``busy`` nothing is trained, so that the candidate is the one it
    looks at.
    """

    @property
    def busy(self) -> bool: ...

    @property
    def standing(self) -> Standing:
        """What it knows, in numbers."""
        ...

    def figures(self, serves_loaded: bool) -> GuardFigures | None:
        """How its tests stand, for people; None where it tests nothing."""
        ...

    def observe(self, round_: VerifyRound, serves_loaded: bool) -> None:
        """One more round, served by a trained draft or by the one that was loaded."""
        ...

    def judge(
        self,
        result: UpdateResult | None,
        seen: Snapshot,
        candidate: Callable[[], Mapping[str, Tensor]],
    ) -> Verdict:
        """Asked after every round in which nothing is being trained, of what was (None: nothing).

        What it says is done. ``seen`` is of before the update; ``candidate`` gives the weights of the
        newest one, which may be published still. Of several ranks all say the same.
        """
        ...

    def request_ended(self, round_: int) -> None:
        """State per request: the draft as loaded serves the next one, and training begins anew."""
        ...

    def start_anew(self, round_: int) -> None:
        """An earlier version serves again that it did not ask for: what it has seen is of others."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """All that it remembers."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a ``state()``."""
        ...


class Publisher(Protocol):
    """Puts weights into the serving draft."""

    version: int

    def state(self) -> Mapping[str, Tensor]:
        """The weights that serve, where they are not those loaded, in tensors that are nobody else's."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Serve the weights of a ``state()`` under the version they had."""
        ...

    def publish(self, weights: Mapping[str, Tensor]) -> WeightVersion: ...

    def weights_of(self, version: int) -> Mapping[str, Tensor]:
        """The trained weights of a version that is still kept."""
        ...


class Sink(Protocol):
    """Takes events, one at a time."""

    def emit(self, kind: str, **fields: Any) -> None: ...


class RoundObserver(Protocol):
    """Who is called by the engine after every round: the co-scheduler."""

    @property
    def version(self) -> int:
        """Of the draft that serves: 0 as loaded, one more with every publication."""
        ...

    def on_round(self, round_: VerifyRound) -> None: ...
