"""Is an adapted draft ever worse than a frozen one? Acceptance length and speed, cell by cell.

Usage: python benchmarks/bench_never_worse.py [--drafters eagle3 dflash pard] [--domains code translated]
           [--texts sampled documents] [--tokens 2048] [--max-prompts 6] [--work DIR] [--set key.sub=value …]

Records once what the target says at temperature 1 and real held-out documents, in the draft's own
domain (``code``) and in a far one (``translated``). Then all arms say each recording again, live:
the text is the same for all, and so are the target's costs. ``adapted`` arms learn as
configs/never_worse.yaml says. A cell holds if the acceptance length of ``adapted+window`` is at
least 0.99 of the better of both frozen arms, and its speed at least 0.98 of ``frozen``, all costs in.
Exits with 1 if a cell does not hold. Speed beside ``frozen+window`` says what learning alone does: the
window costs nothing. Two hours in one process; ``--domains`` splits it in two.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from bench_adaptation import ROOT, record, run
from rich.console import Console
from rich.table import Table

CONFIG = ROOT / "configs" / "never_worse.yaml"
TAU_AT_LEAST, SPEED_AT_LEAST = 0.99, 0.98


def parsed(description: str | None) -> argparse.Namespace:
    """The command line: which drafters, on which texts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash", "pard"])
    parser.add_argument("--domains", nargs="+", default=["code", "translated"])
    parser.add_argument("--texts", nargs="+", default=["sampled", "documents"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--max-prompts", type=int, default=6)
    parser.add_argument("--work", default="runs/bench_never_worse")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value")
    return parser.parse_args()


def main() -> None:
    options = parsed(__doc__)
    console = Console(width=140)
    table = Table(
        "drafter", "text", "τ frozen", "τ frozen\n+window", "τ adapted\n+window", "of the\nbetter",
        "tokens/s of\nfrozen's", "of frozen\n+window's", "updates", "refused", "rolled\nback", "holds",
        title="never worse",
    )  # fmt: skip
    shares: list[float] = []
    to_window: list[float] = []
    held = True
    for domain in options.domains:
        for text in options.texts:
            trace = record(
                options.work, domain, text, options.tokens, options.max_prompts, options.drafters
            )
            for drafter in options.drafters:
                arms = run(
                    CONFIG,
                    [
                        f"run.dir={options.work}", f"run.name={domain}-{text}-{drafter}",
                        f"engine.trace={trace}", "engine.kind=trace", "engine.live=true",
                        f"drafter.kind={drafter}", "workload.max_prompts=null", *options.overrides,
                    ]
                ).arms  # fmt: skip
                frozen, window, adapted = (arms[name] for name in arms)
                share = adapted.tau / max(frozen.tau, window.tau)
                speed = adapted.tokens_per_s / frozen.tokens_per_s
                to_window.append(adapted.tokens_per_s / window.tokens_per_s)
                holds = share >= TAU_AT_LEAST and speed >= SPEED_AT_LEAST
                held, shares = held and holds, [*shares, share]
                table.add_row(
                    drafter, f"{domain}, {text}", f"{frozen.tau:.3f}", f"{window.tau:.3f}",
                    f"{adapted.tau:.3f}", f"{share:.3f}", f"{speed:.3f}", f"{to_window[-1]:.3f}",
                    str(adapted.updates), str(adapted.refused_updates), str(adapted.rollbacks), "yes" if holds else "NO",
                )  # fmt: skip
                console.print(
                    table.title,
                    drafter,
                    domain,
                    text,
                    f"{share:.3f} {speed:.3f} {to_window[-1]:.3f}",
                )
    mean = statistics.fmean(shares)
    table.caption = (
        f"acceptance length of the better frozen arm's, mean: {mean:.3f}; tokens/s of frozen+window's, "
        f"least and mean: {min(to_window):.3f}, {statistics.fmean(to_window):.3f}"
    )
    console.print(table)
    sys.exit(0 if held and mean > 1 else 1)


if __name__ == "__main__":
    main()
