"""Rounds cut into a few parts, so that a reader of a summary can tell chance from effect.

A share of an arm (tokens a round, drafted tokens that stood) is a sum over a sum. What it would have
been without each of some parts of its rounds gives an interval (``cosched.report.shares``). Parts are

- requests, neighbours together, where there are ``MIN_PARTS`` of them: texts differ, and the interval
  speaks of texts like these;
- else stretches of rounds, one behind the other, of ``MIN_ROUNDS`` or more: neighbouring rounds are
  alike, long stretches hardly. That interval speaks of these texts only.

With less than that there are no parts, and no interval. What is kept is bounded: ``MAX_PARTS`` pairs
for each share.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIN_PARTS = 6  # Student's t with fewer is so wide that an interval says nothing
MAX_PARTS = 12
MIN_ROUNDS = 8  # of a stretch

PartsOf = Literal["requests", "text"]
Pair = tuple[int, int]
"""How many of how many, or tokens of rounds."""


class Parts(msgspec.Struct, frozen=True):
    """What both numbers of a share come to in each part, and what the parts are."""

    of: PartsOf | None = None
    pairs: list[Pair] = []


NO_PARTS = Parts()


def parts_of_rounds(by_request: Mapping[str, Sequence[Pair]]) -> Parts:
    """Cut each request's rounds, each of which adds a pair to a share."""
    requests = [pairs for pairs in by_request.values() if pairs]
    if len(requests) >= MIN_PARTS:
        sums = [_sum(pairs) for pairs in requests]
        return Parts("requests", [_sum(some) for some in _cut(sums, min(MAX_PARTS, len(sums)))])
    rounds = [pair for pairs in requests for pair in pairs]
    number = min(MAX_PARTS, len(rounds) // MIN_ROUNDS)
    if number < MIN_PARTS:
        return NO_PARTS
    return Parts("text", [_sum(some) for some in _cut(rounds, number)])


def _cut(pairs: Sequence[Pair], number: int) -> list[Sequence[Pair]]:
    ends = [len(pairs) * n // number for n in range(number + 1)]
    return [pairs[a:b] for a, b in pairwise(ends)]


def _sum(pairs: Sequence[Pair]) -> Pair:
    return sum(one for one, _ in pairs), sum(other for _, other in pairs)
