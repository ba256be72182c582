"""The real model: what each draft is worth, frozen and learning, on each kind of text; several seeds.

Usage: python benchmarks/bench_real_model.py [--config configs/real_model.yaml] [--seeds 0 1 2]
           [--work runs/bench_real_model] [--behind 512] [--set key.sub=value …]

Runs the file once for each seed; a run that is there stays, so an interrupted benchmark goes on. The
texts are answers of the model that lie in the repository, the same for all arms and seeds; a seed draws
what the draft proposes and what of it is accepted, and says which text comes first: what learning may spend
in advance it spends there. Prints one table: of each text and arm the acceptance
length, on all and on novel positions, and the speed over that of plain and of the same draft frozen (with
or without a window, whichever was faster there), with 95 % intervals over the answers of all seeds, of
which a run must have six to twelve. With --behind a second table has the acceptance length on novel
positions from that place of an answer on, for which answers have to be long. `cosched realworld fetch` comes first.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING

import msgspec
from bench_adaptation import ROOT, run
from rich.console import Console
from rich.table import Table

from cosched.report.intervals import paired_ratio
from cosched.settings.load import load_config
from cosched.telemetry.metrics import RunSummary, TextFigures

if TYPE_CHECKING:
    from cosched.report.intervals import Ratio
    from cosched.telemetry.metrics import Bucket

ALL = "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/real_model.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", default="runs/bench_real_model")
    parser.add_argument("--behind", type=int, help="a place where a bucket of the report begins")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args()
    figures: dict[tuple[str, str], list[TextFigures]] = defaultdict(list)
    deep: dict[str, list[Bucket]] = defaultdict(list)
    for seed in options.seeds:
        summary = _once(options.config, options.work, seed, options.overrides)
        for arm, whole in summary.arms.items():
            left = iter(whole.parts)
            if not whole.by_text:  # one file
                own = msgspec.convert(whole, TextFigures, from_attributes=True)
                figures[ALL, arm].append(own)
            for text, found in whole.by_text.items():
                own = msgspec.structs.replace(found, parts=list(islice(left, found.requests)))
                figures[text, arm].append(own)
                figures[ALL, arm].append(own)
            deep[arm] += [
                one for one in whole.tau_by_position if one.start >= (options.behind or 0)
            ]
    console = Console(width=150)
    console.print(_table(figures, len(options.seeds)))
    if options.behind is not None:
        console.print(_table_behind(deep, options.behind))


def _once(config: str, work: str, seed: int, overrides: list[str]) -> RunSummary:
    kept = ROOT / work / f"seed{seed}" / "summary.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=RunSummary)
    ours = [f"run.dir={work}", f"run.name=seed{seed}", f"run.seed={seed}"]
    texts = load_config(ROOT / config, overrides).workload.documents
    if isinstance(texts, tuple):
        first = seed % len(texts)
        ours.append(f"workload.documents=[{','.join((*texts[first:], *texts[:first]))}]")
    return run(ROOT / config, [*overrides, *ours])


def _table(figures: dict[tuple[str, str], list[TextFigures]], seeds: int) -> Table:
    table = Table(
        "text", "arm", "tokens", "τ", "τ novel", "tokens/s", "of plain", "of frozen",
        title=f"the real model, {seeds} seeds",
    )  # fmt: skip
    before = None
    for (text, arm), found in sorted(figures.items(), key=lambda item: item[0][0]):
        if before not in {None, text}:
            table.add_section()
        frozen = f"{arm.rpartition('.')[0]}.frozen".removeprefix(".")
        controls = [figures.get((text, name)) for name in (frozen, f"{frozen}+window")]
        whole = [one for one in controls if one and len(one) == len(found)]  # of all seeds
        control = max(whole, key=_speed, default=None)
        tokens = sum(one.tokens for one in found)
        table.add_row(
            "" if text == before else text,
            arm,
            f"{tokens:,}",
            f"{tokens / sum(one.rounds for one in found):.3f}",
            _novel(found),
            f"{_speed(found):.1f}",
            _ratio(found, figures.get((text, "plain"))),
            _ratio(found, control),
        )
        before = text
    return table


def _table_behind(deep: dict[str, list[Bucket]], behind: int) -> Table:
    table = Table(
        "arm", "novel rounds", "τ novel", "of frozen", "of frozen+window",
        title=f"from the {behind}th token of an answer on",
    )  # fmt: skip
    reached = {arm: _novel_length(found) for arm, found in deep.items()}
    for arm, length in reached.items():
        rounds = sum(one.rounds_novel for one in deep[arm])
        draft = arm.rpartition(".")[0]
        controls = [f"{draft}.{kind}".removeprefix(".") for kind in ("frozen", "frozen+window")]
        gains = [
            f"{length / reached[one] - 1:+.1%}" if reached.get(one) else "" for one in controls
        ]
        table.add_row(arm, f"{rounds:,}", f"{length:.3f}", *gains)
    return table


def _novel_length(found: list[Bucket]) -> float:
    """Tokens a round, of rounds that began on novel positions."""
    tokens = sum(one.rounds_novel * (one.tau_novel or 0.0) for one in found)
    return tokens / max(1, sum(one.rounds_novel for one in found))


def _novel(found: list[TextFigures]) -> str:
    """The mean over texts and seeds: rounds on novel positions are not in the summary."""
    known = [one.tau_novel for one in found if one.tau_novel is not None]
    return f"{sum(known) / len(known):.3f}" if known else ""


def _speed(found: list[TextFigures]) -> float:
    parts = [part for one in found for part in one.parts]
    return sum(part.tokens for part in parts) / sum(part.seconds for part in parts)


def _ratio(ours: list[TextFigures], theirs: list[TextFigures] | None) -> str:
    if not theirs or ours is theirs:
        return ""
    ratio: Ratio = paired_ratio(
        [part for one in ours for part in one.parts],
        [part for one in theirs for part in one.parts],
    )
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    main()
