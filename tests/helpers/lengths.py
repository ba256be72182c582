"""Draft lengths that follow a script, and a world in which rounds take made-up seconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cosched.loop.lengths import DraftLengths
from cosched.protocols import DraftLength, LengthSnapshot


class Scripted(DraftLength):
    """The lengths of a script, round by round, again and again."""

    def __init__(self, *script: int) -> None:
        self.script = script

    def choose(self, snapshot: LengthSnapshot) -> int:
        return self.script[(snapshot.round_index - 1) % len(self.script)]


class ByTurns(DraftLengths):
    """Each request of a round wants another number of tokens, whatever the draft says."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(Scripted(max_tokens), max_tokens)
        self.by_request = True
        self._asked = 0

    def of_request(self, num_drafted: int, tops: Sequence[float] | None) -> int:
        self._asked += 1
        return num_drafted - (self._asked % 3 == 0)


def simulate(
    length: DraftLength,
    acceptance: Callable[[int, int], float],
    seconds: Callable[[int, int], float],
    rounds: int,
    max_tokens: int = 4,
    num_running: int = 1,
) -> list[tuple[int, int, float]]:
    """Rounds of a policy: tokens drafted and committed by all, and seconds.

    ``acceptance(round, place)`` is of the text, ``seconds(round, K)`` of the machine.
    """
    draw, lengths = random.Random(0), DraftLengths(length, max_tokens)
    played = []
    for now in range(rounds):
        tokens = lengths.of_round(num_running)
        accepted = []
        for _ in range(num_running):
            stood = 0
            while stood < tokens and draw.random() < acceptance(now, stood):
                stood += 1
            accepted.append(stood)
        lasted = seconds(now, tokens)
        lengths.observe([tokens] * num_running, accepted, None, lasted)
        played.append((tokens, sum(accepted) + num_running, lasted))
    return played


def speed(played: list[tuple[int, int, float]]) -> float:
    """Tokens a second."""
    return sum(tokens for _, tokens, _ in played) / sum(seconds for _, _, seconds in played)
