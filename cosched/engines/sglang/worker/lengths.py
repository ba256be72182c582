"""How many tokens SGLang drafts in a round, where a policy of ours decides it.

SGLang can change the number while it serves (its ``--speculative-adaptive``): for each that may be
wanted it prepares attention and, on a GPU, CUDA graphs when it starts, and changes over to them
between two rounds. It asks a policy which; ours is in the place of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from cosched.loop.lengths import DraftLengths
    from cosched.records import VerifyRound

logger = logging.getLogger("cosched")

BESIDES = 9  # rounds, the newest, whose median says what a round takes besides its passes


class ServedLengths:
    """The policy that SGLang's ``AdaptiveController`` asks (its ``AdaptiveSpecPolicy``).

    ``candidate_steps`` are what SGLang prepares: the policy's ``choices``, and ``max_tokens``, which it
    starts with. A round is chosen for with ``choose``, on the first of several ranks, and with
    ``settle`` all of them draft as that one says. It lasts from the counts of the round before to its
    own, less what is done in ``own_time``. With a prompt in between, which under load there may always
    be, that is not known: then it lasts what drafting and verifying took, and what rounds usually take
    besides. A policy that raises is not asked again: ``max_tokens`` are drafted from then on.
    """

    def __init__(
        self,
        lengths: DraftLengths,
        choices: Sequence[int],
        max_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.candidate_steps = sorted({*choices, max_tokens})
        self.max_tokens = max_tokens
        self._lengths = lengths
        self._clock = clock
        self._next = max_tokens
        self._broken = False
        self._counted_at: float | None = None
        self._own_seconds = 0.0
        self._besides = deque([0.0], maxlen=BESIDES)
        self._graph_sizes: list[int] | None = None

    # --- asked by the adaptation -----------------------------------------------------------

    def choose(self, num_running: int) -> int:
        """How many tokens the next round drafts for each of so many requests."""
        if self._broken:
            return self.max_tokens
        try:
            return self._lengths.of_round(num_running)
        except Exception:  # a plugin's mistake must not end SGLang's engine
            logger.exception(
                "cosched drafts %d tokens a round from here on: drafter.length does not work",
                self.max_tokens,
            )
            self._broken = True
            return self.max_tokens

    def settle(self, tokens: int) -> None:
        """The next round drafts so many tokens."""
        self._next = tokens

    @contextmanager
    def own_time(self) -> Generator[None]:
        """What happens in here is not what a round takes."""
        started = self._clock()
        try:
            yield
        finally:
            self._own_seconds += self._clock() - started

    def observe(self, rounds: Iterable[VerifyRound]) -> list[VerifyRound]:
        """Rounds whose counts are known now, in their order, prompts among them; they come back with ``plain_share``."""
        now = self._clock()
        return [self._observe(round_, now) for round_ in rounds]

    def _observe(self, round_: VerifyRound, now: float) -> VerifyRound:
        if not round_.blocks:
            self._counted_at = None
            return round_
        seconds = self._lasted(round_.draft_seconds + round_.verify_seconds, now)
        self._counted_at, self._own_seconds = now, 0.0
        if self._broken:
            return round_
        drafted = [len(block.path_K) for block in round_.blocks]
        accepted = [block.num_accepted for block in round_.blocks]
        self._lengths.observe(drafted, accepted, None, seconds)
        share = self._lengths.plain_share(max(drafted))
        return replace(round_, plain_share=share)

    def _lasted(self, passes: float, now: float) -> float:
        """What a round took whose counts came now, and whose passes so long."""
        if self._counted_at is None:
            return passes + median_low(self._besides)
        seconds = max(passes, now - self._counted_at - self._own_seconds)
        self._besides.append(seconds - passes)
        return seconds

    # --- asked by SGLang -------------------------------------------------------------------

    def get_steps_for_batch(self, batch_size: int) -> int:
        del batch_size  # it was asked for before the ranks met
        return self._next

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """Change nothing now: a round is under way already, where SGLang overlaps them."""

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graph_sizes = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """Batches to capture: all, for each number. One without its graph would be a slow round."""
        del step
        return self._graph_sizes
