"""How soon does the guard tell text that a draft can learn from other text?

Usage: python benchmarks/bench_guard.py [--drafters eagle3 dflash pard] [--domains code translated]
           [--texts sampled documents] [--tokens 2048] [--max-prompts 6] [--work DIR] [--set key.sub=value …]

Records texts as bench_never_worse.py does (the same ``--work`` shares them) and trains on each from
the draft as it was loaded, every 16 rounds, with the default guard. For each text the table says
what became of the first candidate: ``+n``, it served after n rows that no update had had, or
``-n``, it was seen to be worse after so many; nothing, if neither was known at the end of the text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bench_adaptation import ROOT, record, run
from bench_never_worse import CONFIG, parsed
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def main() -> None:
    options = parsed(__doc__)
    console = Console(width=120)
    table = Table("drafter", "text", "served", "worse", "first candidate of each text")
    for domain in options.domains:
        for text in options.texts:
            trace = record(
                options.work, domain, text, options.tokens, options.max_prompts, options.drafters
            )
            for drafter in options.drafters:
                name = f"{domain}-{text}-{drafter}-guard"
                run(
                    CONFIG,
                    [
                        f"run.dir={options.work}", f"run.name={name}", f"engine.trace={trace}",
                        "engine.kind=trace", "arms=[adapted+window]", f"drafter.kind={drafter}",
                        "workload.max_prompts=null", "adapt.scope.state=per_request",
                        "adapt.policy={kind: every_n_rounds, rounds: 16}", *options.overrides,
                    ]
                )  # fmt: skip
                found = list(outcomes(ROOT / options.work / name / "events.jsonl"))
                served, worse = (sum(sign * n > 0 for n in found) for sign in (1, -1))
                table.add_row(
                    drafter, f"{domain}, {text}", str(served), str(worse),
                    " ".join(f"{number:+d}" for number in found),
                )  # fmt: skip
                console.print(drafter, domain, text, found)
    console.print(table)


def outcomes(events: Path) -> Iterator[int]:
    """Rows on which each request's first candidate was judged: negative if it was seen to be worse."""
    judged, open_ = 0, True
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["kind"] == "reset":
            judged, open_ = 0, True
        verdict = event.get("verdict")
        if not open_ or verdict is None or verdict["candidate_score"] is None:
            continue
        judged += verdict["num_rows"]
        if verdict["action"] != "wait":
            open_ = False
            yield judged if verdict["action"] == "publish" else -judged


if __name__ == "__main__":
    main()
