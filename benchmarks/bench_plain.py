"""Plain decoding: the embedded engine against ``transformers``' own ``generate``, and what did it.

Usage: python benchmarks/bench_plain.py [--target models/SmolLM2-135M-Instruct] [--tokens 32] [--repeats 3] [--json FILE]

Greedy, the same weights in the same type, no stopping; both decode as many tokens after the same
prompts, in turns, prefill included in neither (it is timed by itself and taken off). Rows with
``pack`` off show what packed weights bring, and what is left is the cache and the attention. Last, what
a verification of several rows costs, in plain steps of the same kind (``--rows``).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_cost_ratio import target_step

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.packing import pack
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verifiers import GreedyVerifier
from cosched.engines.request import GenerationRequest


def ours(target: Target, prompts_BP: torch.Tensor, tokens: int) -> float:
    """Seconds for all tokens after the first of each request."""
    batch, length = prompts_BP.shape
    requests = [
        GenerationRequest(str(n), prompt, tokens + 1) for n, prompt in enumerate(prompts_BP)
    ]
    engine = EmbeddedEngine(
        LiveRows(target, batch, length + tokens + 2, ()),
        GreedyVerifier(),
        None,
        EngineOptions(batch, length + tokens + 2, 0, frozenset()),
        target.device,
    )
    started = time.perf_counter()
    for _ in engine.generate(requests):
        pass
    return time.perf_counter() - started - engine.seconds.prefill


def theirs(model: torch.nn.Module, prompts_BP: torch.Tensor, tokens: int) -> float:
    """The same for ``generate``: its time for tokens + 1, less its time for one."""

    def seconds(number: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(  # pyright: ignore[reportCallIssue]
                prompts_BP,
                attention_mask=torch.ones_like(prompts_BP),
                do_sample=False,
                min_new_tokens=number,
                max_new_tokens=number,
                pad_token_id=0,
            )
        return time.perf_counter() - started

    return seconds(tokens + 1) - seconds(1)


@torch.no_grad()
def verifications(
    targets: dict[str, Target], context: int, rows: list[int], repeats: int
) -> dict[str, Figure]:
    """Print what so many rows of one request cost behind a context, in turns; returns it in plain steps."""
    steps = {
        (name, n): target_step(target, context, n) for n in rows for name, target in targets.items()
    }
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for turn in range(repeats + 1):  # the first one warms up
        for key, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                spent[key].append(time.perf_counter() - started)
    figures: dict[str, Figure] = {}
    for name in targets:
        for n in rows[1:]:
            turns = zip(spent[name, n], spent[name, rows[0]], strict=True)
            ratio = median_of([many / one for many, one in turns], "times")
            figures[f"{name}, verification of {n} rows behind {context} tokens"] = ratio
        median = {n: statistics.median(spent[name, n]) for n in rows}
        cells = [f"{n} {median[n] / median[rows[0]]:.2f}" for n in rows[1:]]
        plain = f"{rows[0]} row {median[rows[0]] * 1e3:.1f} ms"
        print(f"context {context}, {name}: {plain}; rows and plain steps: {', '.join(cells)}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 6, 8, 12, 16])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    device = torch.device("cpu")
    packed, unpacked, peer = (Target.load(options.target, device, torch.float32) for _ in range(3))
    pack(packed.model)
    peer.model.set_attn_implementation("sdpa")
    arms = {
        "transformers": lambda prompts: theirs(peer.model, prompts, options.tokens),
        "pack: false": lambda prompts: ours(unpacked, prompts, options.tokens),
        "cosched": lambda prompts: ours(packed, prompts, options.tokens),
    }
    print(
        f"float32, {torch.get_num_threads()} threads, tokens/s: median of {options.repeats} turns"
    )
    for batch in options.batches:
        for context in options.contexts:
            torch.manual_seed(0)
            prompts = torch.randint(5, packed.vocab_size, (batch, context))
            spent: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(options.repeats):
                for name, arm in arms.items():
                    spent[name].append(arm(prompts))
            base = spent["transformers"]
            cells = [
                f"{name} {batch * options.tokens / statistics.median(times):.1f} "
                f"({statistics.median(b / t for b, t in zip(base, times, strict=True)):.2f}x)"
                for name, times in spent.items()
            ]
            print(f"batch {batch:2}, context {context:4}: {', '.join(cells)}", flush=True)
            for name, times in spent.items():
                where = f"{name}, {batch} requests, {context} tokens of context"
                speeds = [batch * options.tokens / seconds for seconds in times]
                ratios = [b / t for b, t in zip(base, times, strict=True)]
                figures[where] = median_of(speeds, "tokens/s")
                figures[f"{where}, of transformers"] = median_of(ratios, "times")
    both = {"pack: false": unpacked, "cosched": packed}
    figures |= verifications(both, min(options.contexts), options.rows, 5 * options.repeats)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
