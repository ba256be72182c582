"""What watching costs: co-scheduler with policy ``never`` against the bare engine loop.

Usage: python benchmarks/bench_overhead.py [--pairs 12] [--tokens 192] [--threads 2] [--json FILE]

The same greedy request is decoded by two engines in turn, one with a co-scheduler that collects
and counts but never trains, one without. Times are per round; the order within a pair alternates.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from cosched.bench.figures import median_of, write_figures
from cosched.build.embedded import World, build_arm, build_world
from cosched.settings.load import load_config

ROOT = Path(__file__).parent.parent


class Discard:
    """A sink that keeps nothing: the events' cost is the run's, not the co-scheduler's."""

    def emit(self, kind: str, **fields: object) -> None:
        pass


def seconds_per_round(world: World, arm: str) -> float:
    built = build_arm(world, arm, Discard())
    started = time.perf_counter()
    rounds = sum(len(done.rounds) for done in built.engine.generate(world.requests))
    return (time.perf_counter() - started) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            "adapt.policy.kind=never",
            "workload.max_prompts=1",
            "workload.documents=null",
            "workload.prompts=tinyworld/prompts/translated.jsonl",
            f"workload.max_new_tokens={options.tokens}",
            "workload.temperature=0",
            "workload.stop_at_end_of_text=false",
        ],
    )
    world = build_world(config)
    for arm in ("frozen", "adapted"):
        seconds_per_round(world, arm)  # warm up
    bare, watched = [], []
    for pair in range(options.pairs):
        order = ("frozen", "adapted") if pair % 2 else ("adapted", "frozen")
        found = {arm: seconds_per_round(world, arm) for arm in order}
        bare.append(found["frozen"])
        watched.append(found["adapted"])
    ratios = sorted(w / b for w, b in zip(watched, bare, strict=True))
    figures = {
        "bare ms a round": median_of([1e3 * seconds for seconds in bare], "ms"),
        "never ms a round": median_of([1e3 * seconds for seconds in watched], "ms"),
        "never / bare": median_of(ratios, "times"),
    }
    print(f"bare loop             {figures['bare ms a round'].value:7.3f} ms a round (median)")
    print(f"with policy never     {figures['never ms a round'].value:7.3f} ms a round (median)")
    print(
        f"paired ratio          {figures['never / bare'].value:7.3f} median, "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f} over {options.pairs} pairs (aim: at most 1.02)"
    )
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
