"""What a round is made of: a plain step, a verification, a proposal; and what a draft must reach to pay.

Usage: python benchmarks/bench_cost_ratio.py [--context 512] [--turns 60] [--threads 2] [--json FILE]

Break-even is the acceptance length at which speculation is as fast as plain decoding:
(verification of K + 1 rows + proposal) / plain step. All parts run in turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.build.embedded import build_world, load_drafter
from cosched.engines.embedded.target import Target
from cosched.protocols import Drafter
from cosched.records import Segment
from cosched.settings.load import load_config

ROOT = Path(__file__).parent.parent


@torch.no_grad()
def target_step(target: Target, context: int, rows: int) -> Callable[[], object]:
    """A forward of some rows behind a context; the cache is written again at the same place."""
    cache = target.new_cache(1, context + rows)
    at = torch.arange(context + rows, device=target.device)[None]
    ids = at % target.vocab_size
    target.forward(ids[:, :context], at[:, :context], cache, num_logits=1)
    return lambda: target.forward(ids[:, context:], at[:, context:], cache)


@torch.no_grad()
def proposal(drafter: Drafter, target: Target, context: int, turns: int) -> Callable[[], object]:
    """A round of the draft: two newly committed tokens, then K drafts."""
    state = drafter.new_state(1, context + 2 * (turns + 10), None)
    width = len(drafter.signal.feature_layers) * target.hidden_size

    def observe(count: int) -> None:
        tokens = torch.arange(2, count + 3, device=target.device)
        features = torch.randn(count, width, device=target.device) if width else None
        drafter.observe(state, 0, Segment("bench", 0, tokens, features, None))

    observe(context)

    def step() -> None:
        drafter.propose(state, 1, lambda _k, logits: logits.argmax(-1), drafter.num_draft_tokens)
        observe(2)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash", "pard"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    steps: dict[str, Callable[[], object]] = {}
    for kind in options.drafters:
        overrides = [f"drafter.kind={kind}", "workload.max_prompts=1"]
        world = build_world(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
        drafter, target = load_drafter(world), world.target
        rows = drafter.num_draft_tokens + 1
        steps["plain step"] = target_step(target, options.context, 1)
        steps[f"verify {rows} rows"] = target_step(target, options.context, rows)
        steps[kind] = proposal(drafter, target, options.context, options.turns)
    torch.set_num_threads(options.threads)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.turns + 5):
        for name, step in steps.items():
            started = time.perf_counter()
            with torch.no_grad():
                step()
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 5:
                times[name].append(time.perf_counter() - started)
    plain, verify, *_ = times.values()
    print(
        f"{options.context} tokens of context, {options.threads} threads, {rows - 1} drafts a round"
    )
    figures: dict[str, Figure] = {}
    for name, seconds in times.items():
        ratio = statistics.median(seconds) / statistics.median(plain)
        share = f"{ratio:6.3f} plain steps"
        if name in options.drafters:
            share += f", one of {rows - 1} tokens {(rows - 1) / ratio:5.1f} times cheaper"
            turns = zip(verify, seconds, plain, strict=True)
            figures[f"{name} break-even"] = median_of([(v + s) / p for v, s, p in turns], "times")
            share += f", break-even at {figures[f'{name} break-even'].value:.2f}"
        figures[f"{name} ms"] = median_of([1e3 * one for one in seconds], "ms")
        print(f"{name:<14} {figures[f'{name} ms'].value:7.2f} ms  {share}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
