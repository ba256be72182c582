"""Does adaptation pay on text that the draft never saw? Paired, on recorded text.

Usage: python benchmarks/bench_adaptation.py [--drafters eagle3 dflash pard] [--work DIR]
           [--tokens 1024] [--max-prompts N] [--domains …] [--texts …] [--beyond 0]
           [--set key.sub=value …]

Records, once, what the target says at temperature 1 and real held-out documents, in the domain that
the drafts were taught on (``code``), in a near one (``manuals``, English) and in a far one
(``translated``, German and French). Then every arm is judged on the same recordings by the trace
engine, every drafter on the same ones. Prints acceptance length on all and on novel positions, by
generated position, and in the end one table of all drafters, whose gains are those of positions
``--beyond`` which the drafts were not taught, for instance 256. Overrides apply to the arms, not to
the recording.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cosched.memory.sketch import sketch
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.metrics import ArmSummary, RunSummary
from cosched.telemetry.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
SAMPLED = ROOT / "configs" / "sampled.yaml"
ARMS = ["frozen", "frozen+window", "adapted", "adapted+window"]


def workload(domain: str, text: str, tokens: int, max_prompts: int | None) -> list[str]:
    prompts = "null" if max_prompts is None else max_prompts
    shared = [f"workload.max_new_tokens={tokens}", f"workload.max_prompts={prompts}"]
    if text == "documents":
        return [
            *shared,
            f"workload.documents=tinyworld/documents/{domain}.jsonl",
            "workload.prompts=null",
        ]
    return [*shared, f"workload.prompts=tinyworld/prompts/{domain}.jsonl"]


def run(file: Path, overrides: list[str], record: bool = False) -> RunSummary:
    """Run a file with overrides, in place of what lies in its folder."""
    experiment = Experiment(load_config(file, overrides), record)
    folder = RunFolder(experiment.config.run_folder)
    folder.create(overwrite=True)
    return experiment.run(folder)


def record(
    work: str, domain: str, text: str, tokens: int, max_prompts: int | None, drafters: list[str]
) -> str:
    """The trace of what the target says of a text, which is made if it is not there."""
    prompts = "" if max_prompts is None else f"{max_prompts}x"
    name = f"{domain}-{text}-{prompts}{tokens}-recorded"
    if not (ROOT / work / name / "summary.json").exists():
        overrides = [
            f"run.dir={work}",
            f"run.name={name}",
            *workload(domain, text, tokens, max_prompts),
            "arms=[plain]",
            f"record.feature_layers={sorted(layers_of(drafters))}",
        ]
        run(SAMPLED, overrides, record=True)
    return f"{work}/{name}/trace"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash", "pard"])
    parser.add_argument("--work", default="runs/bench_adaptation")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--max-prompts", type=int, default=None)
    parser.add_argument("--beyond", type=int, default=0, metavar="POSITION")
    parser.add_argument("--texts", nargs="+", default=["sampled", "documents"])
    parser.add_argument("--domains", nargs="+", default=["code", "manuals", "translated"])
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    console = Console(width=120)
    found: dict[str, dict[str, RunSummary]] = {drafter: {} for drafter in options.drafters}
    for domain in options.domains:
        for text in options.texts:
            name = f"{domain}-{text}"
            trace = record(
                options.work, domain, text, options.tokens, options.max_prompts, options.drafters
            )
            for drafter in options.drafters:
                summary = run(
                    SAMPLED,
                    [
                        f"run.dir={options.work}",
                        f"run.name={name}-{drafter}",
                        "engine.kind=trace",
                        f"engine.trace={trace}",
                        f"drafter.kind={drafter}",
                        f"arms=[{','.join(ARMS)}]",
                        "workload.max_prompts=null",
                        *options.overrides,
                    ],
                )
                found[drafter][name] = summary
                console.print(table(f"{drafter}, {name}", summary))
    console.print(overview(found, options.beyond))


def layers_of(drafters: list[str]) -> set[int]:
    """Target layers whose features any of the drafters needs."""
    layers: set[int] = set()
    for drafter in drafters:
        config = load_config(SAMPLED, [f"drafter.kind={drafter}"])
        layers |= set(sketch(config)[1].signal.feature_layers)
    return layers


def overview(found: dict[str, dict[str, RunSummary]], beyond: int) -> Table:
    """One line for each drafter and text: acceptance length, and what learning adds to it."""
    rows = Table(
        "drafter", "text", *(f"{arm}\nall / novel" for arm in ARMS), "adapted\nover both",
        "adapted+window\nover both", title=f"acceptance length, all and novel from {beyond} on",
    )  # fmt: skip
    for drafter, texts in found.items():
        for name, summary in texts.items():
            arms = [summary.arms[arm] for arm in ARMS]
            novel = [tau_novel(arm, beyond) for arm in arms]
            gains = [[at / control - 1 for control in novel[:2]] for at in novel[2:]]
            rows.add_row(
                drafter,
                name,
                *(f"{arm.tau:.3f} / {at:.3f}" for arm, at in zip(arms, novel, strict=True)),
                *(f"{frozen:+.1%} {window:+.1%}" for frozen, window in gains),
            )
        rows.add_section()
    rows.caption = "gains are those of novel positions, over frozen and over frozen+window"
    return rows


def tau_novel(arm: ArmSummary, start: int) -> float:
    """Of all generated positions from ``start`` on, which is the beginning of a bucket."""
    buckets = [b for b in arm.tau_by_position if b.start >= start and b.rounds_novel]
    committed = sum((b.tau_novel or 0.0) * b.rounds_novel for b in buckets)
    return committed / max(1, sum(b.rounds_novel for b in buckets))


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
