"""Does adaptation pay on text that the draft never saw? Paired, on recorded text.

Usage: python benchmarks/bench_adaptation.py [--work DIR] [--tokens 1024] [--set key.sub=value …]

Records, once, what the target says at temperature 1 and real held-out documents, in the domain that
the draft was taught on (``code``), in a near one (``manuals``, English) and in a far one
(``translated``, German and French). Then every arm is judged on the same recordings by the trace
engine. Prints acceptance length on all and on novel
positions, and by generated position. Overrides apply to the arms, not to the recording.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cosched.config import load_config
from cosched.experiment import Experiment
from cosched.telemetry.metrics import RunSummary
from cosched.telemetry.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
ARMS = ["frozen", "frozen+window", "adapted", "adapted+window"]


def workload(domain: str, text: str, tokens: int) -> list[str]:
    shared = [f"workload.max_new_tokens={tokens}", "workload.max_prompts=null"]
    if text == "documents":
        return [
            *shared,
            f"workload.documents=tinyworld/documents/{domain}.jsonl",
            "workload.prompts=null",
        ]
    return [*shared, f"workload.prompts=tinyworld/prompts/{domain}.jsonl"]


def run(overrides: list[str], overwrite: bool, record: bool = False) -> RunSummary | None:
    """Run configs/sampled.yaml with overrides; None if the folder is there and may stay."""
    config = load_config(ROOT / "configs" / "sampled.yaml", overrides)
    if config.run_folder.exists() and not overwrite:
        return None
    experiment = Experiment(config, record)
    folder = RunFolder(config.run_folder)
    folder.create(overwrite=True)
    return experiment.run(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="runs/bench_adaptation")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--texts", nargs="+", default=["sampled", "documents"])
    parser.add_argument("--domains", nargs="+", default=["code", "manuals", "translated"])
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    console = Console(width=120)
    for domain in options.domains:
        for text in options.texts:
            name = f"{domain}-{text}"
            place = [f"run.dir={options.work}"]
            run(
                [
                    *place,
                    *workload(domain, text, options.tokens),
                    f"run.name={name}-recorded",
                    "arms=[plain]",
                ],
                overwrite=False,
                record=True,
            )
            summary = run(
                [
                    *place,
                    f"run.name={name}-judged",
                    "engine.kind=trace",
                    f"engine.trace={options.work}/{name}-recorded/trace",
                    f"arms=[{','.join(ARMS)}]",
                    "workload.max_prompts=null",
                    *options.overrides,
                ],
                overwrite=True,
            )
            assert summary is not None
            console.print(table(name, summary))


def table(name: str, summary: RunSummary) -> Table:
    edges = [f"{b.start}-{b.end}" for b in summary.arms[ARMS[0]].tau_by_position]
    rows = Table(
        "arm", "τ all", "τ novel", "vs frozen, novel", *edges, title=f"{name}: acceptance length"
    )
    frozen = summary.arms["frozen"].tau_novel or 1.0
    for arm, figures in summary.arms.items():
        novel = figures.tau_novel or 0.0
        rows.add_row(
            arm,
            f"{figures.tau:.3f}",
            f"{novel:.3f}",
            f"{novel / frozen - 1:+.1%}",
            *(f"{bucket.tau:.2f}" for bucket in figures.tau_by_position),
        )
    repeats = summary.arms[ARMS[0]].repeat_fraction
    rows.caption = f"{summary.arms[ARMS[0]].tokens} tokens, repeat fraction {repeats:.1%}"
    return rows


if __name__ == "__main__":
    main()
