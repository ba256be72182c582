"""What deciding how many tokens to draft takes: choosing a length, and taking in what came of it.

Usage: python benchmarks/bench_deciding.py [--most 7] [--batches 1 16] [--repeats 12] [--json FILE]

Of each policy in ``drafter.length`` that chooses, in milliseconds a request and round; a round of the real
model takes some 20.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.loop.lengths import DraftLengths
from cosched.registry import LENGTHS

ROUNDS = 500
POLICIES = ("goodput", "threshold")


def milliseconds(policy: str, most: int, batch: int) -> float:
    """Of a request and round, the mean of many."""
    cls = LENGTHS.get(policy)
    lengths = DraftLengths(cls(cls.Settings(kind=policy)), most)
    tops = [[0.9] * most] * batch
    started = time.perf_counter()
    for number in range(ROUNDS):
        drafted = [lengths.of_round(batch)] * batch
        if lengths.by_request:
            for k in range(batch * most):
                lengths.of_request(1 + k % most, tops[0][: 1 + k % most])
        accepted = [min(number % 3, drafted[0])] * batch
        lengths.observe(drafted, accepted, tops, 0.02 + 0.002 * drafted[0])
    return 1e3 * (time.perf_counter() - started) / ROUNDS / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    for policy in POLICIES:
        for batch in options.batches:
            spent = [milliseconds(policy, options.most, batch) for _ in range(options.repeats)]
            name = f"{policy}, {batch} requests, ms"
            figures[name] = median_of(spent, "ms")
            print(f"{name:<28}{figures[name].value:8.4f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
