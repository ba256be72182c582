"""Whether a candidate may serve, and whether what serves may stay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import torch

from cosched.errors import NOT_DECODED, RunFolderError
from cosched.guard.monitor import Monitor, Scores
from cosched.loop.layout import first_places
from cosched.records import KEEP, Standing, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.guard.settings import ShadowSettings
    from cosched.loop.roles import Buffer, Publisher, Scorer
    from cosched.records import GuardFigures, Snapshot, UpdateResult, VerifyRound

LOOKED_AT = 4  # times ``anchors``: rows of a look, at most
STATE = "guard.monitor"


class FiniteGuard:
    """Refuses an update none of whose steps was taken; DeepSpeed has skipped the non-finite ones.

    It remembers nothing.
    """

    standing = Standing()
    busy = False

    def figures(self, serves_loaded: bool) -> None:
        """It tests nothing."""

    def observe(self, round_: VerifyRound, serves_loaded: bool) -> None:
        """What serves is not watched."""

    def judge(
        self,
        result: UpdateResult | None,
        seen: Snapshot,  # noqa: ARG002  the role's signature
        candidate: Callable[[], Mapping[str, Tensor]],  # noqa: ARG002
    ) -> Verdict:
        if result is None:
            return KEEP
        if result.num_skipped == result.num_steps:
            return Verdict("wait", "every step was non-finite and skipped")
        return Verdict("publish", "finite")

    def request_ended(self, round_: int) -> None:
        """There is nothing to forget."""

    def start_anew(self, round_: int) -> None:
        """There is nothing to forget."""

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing to remember."""


class ShadowGuard:
    """Scores candidates, and what serves, on rows that no update has had; ``Monitor`` concludes.

    It looks after each update, ``check_rounds`` after the last look, and as soon as the acceptance
    length of a trained draft has fallen far. Without rows to look at (the request has just ended) a
    candidate waits. Ranks that score together conclude alike, because nothing here goes by a clock.
    Where the scorer takes its time a look is concluded in a later round than it began. Where ``length_is_chosen``
    while serving (``drafter.length``), drafts are scored on as many tokens as rounds draft lately: what they
    are worth behind those nobody is served.
    """

    def __init__(
        self,
        settings: ShadowSettings,
        scorer: Scorer,
        buffer: Buffer,
        publisher: Publisher,
        length_is_chosen: bool = False,
    ) -> None:
        self._settings = settings
        self.scorer = scorer
        self._buffer = buffer
        self._publisher = publisher
        self._length_is_chosen = length_is_chosen
        self._monitor = Monitor()
        self._scored: tuple[str, ...] = ()  # what the look that is under way is at

    @property
    def busy(self) -> bool:
        return self.scorer.busy

    @property
    def standing(self) -> Standing:
        return self._monitor.standing

    def figures(self, serves_loaded: bool) -> GuardFigures:
        return self._monitor.figures(self._settings, serves_loaded)

    def observe(self, round_: VerifyRound, serves_loaded: bool) -> None:
        if round_.blocks:
            length = round_.num_committed / len(round_.blocks)
            elsewhere = round_.served_loaded
            self._monitor.observe(length, serves_loaded if elsewhere is None else elsewhere)

    def judge(
        self,
        result: UpdateResult | None,
        seen: Snapshot,
        candidate: Callable[[], Mapping[str, Tensor]],
    ) -> Verdict:
        if self.scorer.busy:
            return self._concluded(self.scorer.finished(), seen)
        if result is not None:
            if result.num_skipped == result.num_steps:
                return FiniteGuard().judge(result, seen, candidate)
            self._monitor.waits = True
        elif not self._monitor.overdue(self._settings, seen):
            return KEEP
        rows = self._buffer.held_out(LOOKED_AT * self._settings.anchors, once=True)
        if rows is None:
            return Verdict("wait", "no held-out rows to score it on") if result else KEEP
        if self._length_is_chosen:
            rows = first_places(rows, max(1, math.ceil(seen.recent_drafted_tokens)))
        asked = self._asked(seen, candidate() if self._monitor.waits else None)
        self._scored = tuple(asked)
        return self._concluded(self.scorer.scores(rows, list(asked.values())), seen)

    def _asked(
        self, seen: Snapshot, candidate: Mapping[str, Tensor] | None
    ) -> dict[str, Mapping[str, Tensor]]:
        """What serves, the candidate, and what there was before anything was learnt."""
        asked = {"serving": self._publisher.weights_of(seen.draft_version)}
        if candidate is not None:
            asked["candidate"] = candidate
        if not seen.serves_loaded:
            asked["loaded"] = self._publisher.weights_of(0)
        return asked

    def _concluded(self, found: list[list[float]] | None, seen: Snapshot) -> Verdict:
        """On the same rows; None: not yet."""
        if found is None:
            return KEEP
        scores = Scores(**dict(zip(self._scored, found, strict=True)))
        return self._monitor.look(scores, self._settings, seen)

    def request_ended(self, round_: int) -> None:
        self.scorer.forget()
        self._monitor.request_ended(round_)

    def start_anew(self, round_: int) -> None:
        self.scorer.forget()
        self._monitor = Monitor(looked_at=round_)

    def state(self) -> Mapping[str, Tensor]:
        """All that it remembers, as bytes: numbers keep their last bit."""
        remembered = bytearray(msgspec.msgpack.encode(self._monitor))
        return {STATE: torch.frombuffer(remembered, dtype=torch.uint8)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what that guard did.

        Raises:
            RunFolderError: it is no guard's.
        """
        try:
            remembered = bytes(tensors[STATE].tolist())
            self._monitor = msgspec.msgpack.decode(remembered, type=Monitor)
        except (KeyError, TypeError, ValueError, *NOT_DECODED) as error:
            raise RunFolderError(f"{STATE} of the saved state is no guard's: {error}") from error
