"""Tokens per second on natural text, all costs included: plain, frozen, frozen+window, adapted.

Usage: python benchmarks/bench_speed.py [--texts sampled documents] [--tokens 640] [--prompts 6] [--work DIR]
           [--json FILE] [--set key.sub=value …]

Two kinds of text of a domain that the draft never saw: what the target says at temperature 1 (arms
say different texts, so compare speeds over many tokens only), and real held-out documents that
every arm is made to say, at the real cost of drafting, verifying, updating and publishing. The arms
take turns, a few tokens at a time, in one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench_adaptation import SAMPLED, run, workload
from rich.console import Console

from cosched.report.table import summary_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="runs/bench_speed")
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--texts", nargs="+", default=["sampled", "documents"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    console, figures = Console(width=120), dict[str, float | None]()
    for text in options.texts:
        summary = run(
            SAMPLED,
            [
                f"run.dir={options.work}",
                f"run.name={text}",
                *workload("translated", text, options.tokens, options.prompts),
                *options.overrides,
            ],
        )
        console.print(summary_table(summary))
        plain = summary.arms["plain"].tokens_per_s
        for name, arm in summary.arms.items():
            figures[f"{text} {name} tokens/s"] = arm.tokens_per_s
            if name != "plain":
                figures[f"{text} {name} / plain"] = arm.tokens_per_s / plain
                figures[f"{text} {name} tau"] = arm.tau
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
