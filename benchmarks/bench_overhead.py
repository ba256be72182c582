"""What watching costs: co-scheduler with policy ``never`` against the bare engine loop.

Usage: python benchmarks/bench_overhead.py [--pairs 12] [--tokens 192] [--threads 2] [--json FILE]
                                           [--tracker tensorboard]

The same greedy request is decoded by two engines in turn, one with a co-scheduler that collects
and counts but never trains, one without. Times are per round; the order within a pair alternates. With a
``--tracker`` there is a third, which is as the first and drawn besides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from cosched.bench.figures import median_of, write_figures
from cosched.build.embedded import World, build_arm, build_world
from cosched.settings.load import load_config
from cosched.telemetry.trackers.curves import Curves
from cosched.telemetry.trackers.opening import check_installed, open_trackers

ROOT = Path(__file__).parent.parent


class Discard:
    """A sink that keeps nothing: the events' cost is the run's, not the co-scheduler's."""

    def emit(self, kind: str, **fields: object) -> None:
        pass


def seconds_per_round(world: World, arm: str, curves: Curves | None = None) -> float:
    built = build_arm(world, arm, Discard(), on_row=curves.observe if curves else None)
    if curves is not None:
        curves.learner = built.coscheduler
    started = time.perf_counter()
    rounds = sum(len(done.rounds) for done in built.engine.generate(world.requests))
    return (time.perf_counter() - started) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--tracker", choices=("tensorboard",), help="measure this too")
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
    with tempfile.TemporaryDirectory() as folder:
        curves: dict[str, Curves] = {}
        if options.tracker:
            check_installed([options.tracker])
            curves["tracked"] = Curves(lr=1e-3, by_turns=False)
            curves["tracked"].open(open_trackers([options.tracker], Path(folder), "arm"))
        figures = measure(world, options.pairs, curves)
        for one in curves.values():
            one.close()
    write_figures(options.json, figures)


def measure(world: World, pairs: int, curves: dict[str, Curves]) -> dict:
    arms = {"bare": "frozen", "never": "adapted"} | dict.fromkeys(curves, "adapted")
    for name, arm in arms.items():
        seconds_per_round(world, arm, curves.get(name))  # warm up
    found: dict[str, list[float]] = {name: [] for name in arms}
    for pair in range(pairs):
        for name in list(arms)[:: 1 if pair % 2 else -1]:
            found[name].append(seconds_per_round(world, arms[name], curves.get(name)))
    figures = {
        f"{name} ms a round": median_of([1e3 * seconds for seconds in laps], "ms")
        for name, laps in found.items()
    }
    titles = {"bare": "bare loop", "never": "with policy never", "tracked": "drawn besides"}
    for name in found:
        print(f"{titles[name]:20}  {figures[f'{name} ms a round'].value:7.3f} ms a round (median)")
    for name, against, aim in (("never", "bare", 1.02), ("tracked", "never", 1.01)):
        if name in found:
            ratios = sorted(a / b for a, b in zip(found[name], found[against], strict=True))
            figures[f"{name} / {against}"] = middle = median_of(ratios, "times")
            print(
                f"paired ratio          {middle.value:7.3f} median, {ratios[0]:.3f} to "
                f"{ratios[-1]:.3f} over {pairs} pairs of {name} and {against} (aim: at most {aim})"
            )
    return figures


if __name__ == "__main__":
    main()
