"""How many tokens the next round drafts: what serving has shown, put to a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cosched.loop.round_seconds import RoundSeconds
from cosched.protocols import MOST_UNDRAFTED, LengthSnapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import DraftLength

MEMORY = 256  # drafted blocks after which what was seen counts 1 / e as much
KEPT = 8.0  # that an old mean counts for at least: it stays until it is contradicted
PRIOR = 2.0  # that what is only supposed counts for
BINS = 10  # of the draft's top probability


class DraftLengths:
    """Asks a policy before each round, and of each request where it wants to be; measures the rounds.

    Whatever the policy says, one token is drafted behind ``MOST_UNDRAFTED`` rounds without any, so
    that what a draft has not taken in yet is bounded. Not so a draft that ``keeps_up``: it takes in
    every token in the round that commits it.
    """

    def __init__(self, policy: DraftLength, max_tokens: int, keeps_up: bool = False) -> None:
        self.by_request = policy.by_request
        self._policy = policy
        self._keeps_up = keeps_up
        self._acceptance = Acceptance(max_tokens)
        self._seconds = RoundSeconds(max_tokens) if policy.needs_seconds else None
        self._last = [0] * (max_tokens + 1)  # round in which each length was last drafted
        self._undrafted = 0
        self._seen = LengthSnapshot(max_tokens, 0, 0, (), ())

    def of_round(self, num_running: int) -> int:
        """How many tokens a round of so many requests drafts for each of them, at most."""
        now = self._seen.round_index + 1
        self._seen = LengthSnapshot(
            max_tokens=self._seen.max_tokens,
            num_running=num_running,
            round_index=now,
            acceptance=self._acceptance.by_place(),
            ages=tuple(now - last for last in self._last),
            seconds=self._seconds.table(num_running) if self._seconds else (),
        )
        tokens = self._chosen(self._seen)
        return tokens or int(self._undrafted >= MOST_UNDRAFTED)

    def of_request(self, num_drafted: int, tops: Sequence[float] | None) -> int:
        """How many of its drafted tokens a request has verified, given the top probabilities behind them.

        None: the drafter has no distributions. A token's place tells how likely it is accepted then.
        """
        chances = self._seen.acceptance if tops is None else self._acceptance.by_certainty(tops)
        seen = msgspec.structs.replace(self._seen, chances=chances[:num_drafted])
        return min(num_drafted, self._chosen(seen))

    def plain_share(self, tokens: int) -> float | None:
        """What a round without drafts takes of one that drafts so many tokens; None: not known yet.

        As was known when the newest round was chosen for.
        """
        seconds = self._seen.seconds
        return seconds[0] / seconds[tokens] if seconds and seconds[0] and seconds[tokens] else None

    def _chosen(self, snapshot: LengthSnapshot) -> int:
        tokens = self._policy.choose(snapshot)
        assert 0 <= tokens <= snapshot.max_tokens, f"a policy chose {tokens} tokens"
        return tokens

    def observe(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        tops: Sequence[Sequence[float]] | None,
        seconds: float,
    ) -> None:
        """A round is done: of each request what was verified and accepted, and what all of it took."""
        tokens = max(drafted)
        self._acceptance.observe(drafted, accepted, tops)
        # Behind one without drafts, a draft first takes in what was committed: that is not K's doing.
        if self._seconds and not (tokens and self._undrafted):
            self._seconds.observe(len(drafted), tokens, seconds)
        self._undrafted = 0 if tokens or self._keeps_up else self._undrafted + 1
        self._last[tokens] = self._seen.round_index


class Acceptance:
    """How likely a drafted token is accepted where all before it are: by place, and by certainty.

    A place of which little is known is supposed to be like the one before it. The draft's top
    probability is believed until its tenth of [0, 1] has turned out otherwise.
    """

    def __init__(self, num_places: int) -> None:
        self._places = Shares(num_places)
        self._bins = Shares(BINS)

    def observe(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        tops: Sequence[Sequence[float]] | None,
    ) -> None:
        """One more round; behind the first rejection nothing is known."""
        self._places.fade(len(drafted))
        self._bins.fade(len(drafted))
        for index, (number, stood) in enumerate(zip(drafted, accepted, strict=True)):
            for place in range(min(number, stood + 1)):
                self._places.note(place, place < stood)
                if tops is not None:
                    self._bins.note(_bin(tops[index][place]), place < stood)

    def by_place(self) -> tuple[float, ...]:
        found: list[float] = []
        for place in range(len(self._places)):
            found.append(self._places.share(place, found[-1] if found else 0.5))
        return tuple(found)

    def by_certainty(self, tops: Sequence[float]) -> tuple[float, ...]:
        return tuple(self._bins.share(_bin(top), top) for top in tops)


def _bin(probability: float) -> int:
    return min(BINS - 1, int(probability * BINS))


class Shares:
    """How often something came true, in several cells."""

    def __init__(self, cells: int) -> None:
        self._true = [0.0] * cells
        self._tried = [0.0] * cells

    def __len__(self) -> int:
        return len(self._tried)

    def fade(self, blocks: int) -> None:
        """So many blocks were drafted: what was seen before counts less. Its mean stays."""
        for cell, tried in enumerate(self._tried):
            kept = max(tried * (1 - 1 / MEMORY) ** blocks, min(tried, KEPT))
            if kept < tried:
                self._true[cell] *= kept / tried
                self._tried[cell] = kept

    def note(self, cell: int, came_true: bool) -> None:
        self._true[cell] += came_true
        self._tried[cell] += 1

    def share(self, cell: int, supposed: float) -> float:
        """The mean of what was seen, and a little of what is supposed."""
        return (self._true[cell] + PRIOR * supposed) / (self._tried[cell] + PRIOR)
