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
from pathlib import Path

from rich.console import Console

from cosched.bench.figures import Figure, write_figures
from cosched.report.intervals import Ratio
from cosched.report.table import speed_ratio, summary_table
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
TEXTS = {
    "sampled": ["workload.prompts=tinyworld/prompts/translated.jsonl"],
    "documents": [
        "workload.documents=tinyworld/documents/translated.jsonl",
        "workload.prompts=null",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="runs/bench_speed")
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    console, figures = Console(width=120), dict[str, Figure]()
    for text in options.texts:
        lengths = [
            f"workload.max_new_tokens={options.tokens}",
            f"workload.max_prompts={options.prompts}",
        ]
        place = [f"run.dir={options.work}", f"run.name={text}"]
        overrides = [*place, *lengths, *TEXTS[text], *options.overrides]
        experiment = Experiment(load_config(ROOT / "configs" / "sampled.yaml", overrides))
        folder = RunFolder(experiment.config.run_folder)
        folder.create(overwrite=True)
        summary = experiment.run(folder)
        console.print(summary_table(summary))
        for name, arm in summary.arms.items():
            figures[f"{text} {name} tokens/s"] = Figure(value=arm.tokens_per_s, unit="tokens/s")
            ratio = speed_ratio(summary.arms, name, "plain")
            if name != "plain" and ratio is not None:
                figures[f"{text} {name} / plain"] = of_ratio(ratio)
                figures[f"{text} {name} tau"] = Figure(value=arm.tau, unit="tokens a round")
    write_figures(options.json, figures)


def of_ratio(ratio: Ratio) -> Figure:
    return Figure(value=ratio.value, unit="times", low=ratio.low, high=ratio.high)


if __name__ == "__main__":
    main()
