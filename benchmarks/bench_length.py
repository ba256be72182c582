"""How many tokens to draft: chosen while serving, against the best fixed number, the real model.

Usage: python benchmarks/bench_length.py [--drafters eagle3 dflash pard] [--texts chat code languages long]
           [--batches 1 4 16] [--fixed 1 2 3 5 7] [--base frozen] [--tokens 256] [--prompts 6]
           [--work runs/bench_length] [--set key.sub=value …]

One run for each drafter, text and batch size; its arms take turns on the same text: plain decoding,
each fixed length, `goodput` and `threshold`, which draft at most as many as the longest of them. With
`--base adapted` all drafts learn as the file says, with `--base frozen adapted` both are run: an adapted
arm is then also held against the same draft adapted at the length that was best for it frozen. Prints
a row for each cell: tokens a second of plain and of the best fixed length, which that is, and the two
policies over both, with 95 % intervals where the run is long enough (six requests for each of a
batch), the tokens that they drafted a round, and what deciding takes of a round.
`cosched realworld fetch` comes first.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from bench_adaptation import ROOT, run
from rich.console import Console
from rich.table import Table

from cosched.loop.lengths import DraftLengths
from cosched.registry import LENGTHS
from cosched.report.table import speed_ratio, times

if TYPE_CHECKING:
    from cosched.telemetry.metrics import ArmSummary, RunSummary

POLICIES = ("goodput", "threshold")


def cell(
    options: argparse.Namespace, drafter: str, text: str, batch: int, own: list[str]
) -> RunSummary:
    draft = {"kind": drafter, "path": f"models/drafts/{drafter}", "window": 256}
    drafts = {f"k{k}": {**draft, "num_draft_tokens": k} for k in options.fixed}
    for policy in POLICIES:
        longest = {"num_draft_tokens": max(options.fixed), "length": {"kind": policy}}
        drafts[policy] = {**draft, **longest}
    arms = [f"{name}.{base}+window" for name in drafts for base in options.base]
    overrides = [
        f"run.dir={options.work}",
        f"run.name={drafter}-{text}-{batch}",
        f"engine.max_batch={batch}",
        f"workload.documents=realworld/documents/{text}.jsonl",
        f"workload.max_new_tokens={options.tokens}",
        f"workload.max_prompts={options.prompts * batch}",
        f"drafts={json.dumps(drafts)}",
        f"arms={json.dumps(['plain', *arms])}",
        "adapt.scope.state=shared",
        *own,
    ]
    return run(ROOT / options.config, overrides)


def row(table: Table, where: list[str], summary: RunSummary, base: str, fixed: list[int]) -> None:
    arms = summary.arms
    best = max(fixed, key=lambda k: arms[f"k{k}.{base}+window"].tokens_per_s)
    if base == "adapted" and f"k{best}.frozen+window" in arms:  # chosen before anything is learnt
        best = max(fixed, key=lambda k: arms[f"k{k}.frozen+window"].tokens_per_s)
    rival = f"k{best}.{base}+window"
    cells = [f"{arms['plain'].tokens_per_s:.1f}", f"{arms[rival].tokens_per_s:.1f} (K = {best})"]
    cells.append(times(speed_ratio(arms, rival, "plain")))
    for policy in POLICIES:
        name = f"{policy}.{base}+window"
        cells += [times(speed_ratio(arms, name, other)) for other in (rival, "plain")]
        share = deciding_seconds(policy, max(fixed), int(where[2])) / round_seconds(arms[name])
        cells.append(f"{arms[name].drafted_per_round:.2f}, {share:.2%}")
    table.add_row(*where, base, *cells)


def round_seconds(arm: ArmSummary) -> float:
    """Of a round of one request; those of a batch are counted one by one."""
    return (arm.seconds["draft"] + arm.seconds["verify"]) / max(1, arm.rounds)


def deciding_seconds(policy: str, most: int, batch: int, rounds: int = 500) -> float:
    """What choosing a length and taking in what came of it costs a request and round."""
    cls = LENGTHS.get(policy)
    lengths = DraftLengths(cls(cls.Settings(kind=policy)), most)
    tops = [[0.9] * most] * batch
    started = time.perf_counter()
    for number in range(rounds):
        drafted = [lengths.of_round(batch)] * batch
        if lengths.by_request:
            for k in range(batch * most):
                lengths.of_request(1 + k % most, tops[0][: 1 + k % most])
        accepted = [min(number % 3, drafted[0])] * batch
        lengths.observe(drafted, accepted, tops, 0.02 + 0.002 * drafted[0])
    return (time.perf_counter() - started) / rounds / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/real_model.yaml")
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash", "pard"])
    parser.add_argument("--texts", nargs="+", default=["chat", "code", "languages", "long"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--fixed", type=int, nargs="+", default=[1, 2, 3, 5, 7])
    parser.add_argument("--base", nargs="+", choices=["frozen", "adapted"], default=["frozen"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=6, help="for each place of a batch")
    parser.add_argument("--work", default="runs/bench_length")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    columns = ["draft", "text", "batch", "draft is", "plain", "best fixed", "of plain"]
    for policy in POLICIES:
        columns += [f"{policy}\nof best fixed", "of plain", "drafted, deciding"]
    table = Table(*columns, title="tokens a second by how many tokens a round drafts")
    for drafter in options.drafters:
        for text in options.texts:
            for batch in options.batches:
                summary = cell(options, drafter, text, batch, options.overrides)
                for base in options.base:
                    row(table, [drafter, text, str(batch)], summary, base, options.fixed)
        table.add_section()
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
