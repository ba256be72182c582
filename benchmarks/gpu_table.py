"""The files of gpu_check.py as tables, each figure beside what gpu_model.py or an aim expects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_sglang import compare
from bench_sglang import show as show_rows
from gpu_model import DRAFTS, expected

AIMS = {  # by arm and figure
    ("overhead", "never / bare"): "at most 1.02",
    ("micro-step", "DeepSpeed ZeRO 1 / plain"): "at most 1.25",
    ("sglang-never", "time / stock"): "at most 1.02",
    ("sglang-watching", "time / stock"): "at most 1.04",
    ("sglang-background", "p99 / stock"): "at most 1.05",
    ("sglang-background", "hidden"): "at least 0.90",
}
REFERENCE, NOISE = "sglang-stock", "sglang-stock-again"


def show(work: Path, names: list[str]) -> None:
    """What became of every arm, the figures of those that are no server's, and those of SGLang's."""
    files = {name: work / f"{name}.json" for name in names}
    records = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }
    print(f"\n{len(records)} of {len(names)} arms are in {work}", flush=True)
    if not records:
        return
    show_rows([state(record) for record in records.values()])
    if rows := list(plain_rows(records)):
        print("\nExpected: an aim, or Qwen3-8B on an H200 (benchmarks/gpu_model.md).\n")
        show_rows(rows)
    served(records)


def state(record: dict[str, Any]) -> dict[str, Any]:
    error = record["error"]
    return {
        "arm": record["arm"],
        "outcome": "done" if error is None else error.partition(";")[0],
        "seconds": record["seconds"],
        "device": record["device"],
        "torch": record["torch"],
        "commit": record["commit"],
        "date": record["date"],
    }


def plain_rows(records: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, record in records.items():
        if name.startswith("sglang-"):
            continue
        for figure, value in (record["figures"] or {}).items():
            aim = AIMS.get((name, figure)) or of_update(figure)
            measured = value["value"] if isinstance(value, dict) else value
            yield {"arm": name, "figure": figure, "measured": measured, "expected": aim or ""}


def of_update(figure: str) -> float | None:
    """What the model says of a figure of bench_update.py, ``KIND, REQUESTS[, captured]: PART ms``."""
    where, _, part = figure.partition(": ")
    kind, requests, *how = *where.split(", "), ""
    if kind not in DRAFTS or not requests.isdigit():
        return None
    one = expected(kind, int(requests), "bfloat16", "graph" if "captured" in how else "eager")
    parts = {
        "in all ms": one.update + one.publication,
        "publication ms": one.publication,
        "scores ms": one.scores,
    }
    return 1e3 * parts[part] if part in parts else None


def served(records: dict[str, Any]) -> None:
    """Each beside the stock arm; the second stock arm says what is noise."""
    reference = (records.get(REFERENCE) or {}).get("figures")
    if not reference:
        print(f"\nSGLang's arms have nothing to be compared with: no {REFERENCE}")
        return
    by_size = {row["requests"]: row for row in reference}
    rows: list[dict[str, Any]] = []
    for name, record in records.items():
        if name.startswith("sglang-"):
            for row in record["figures"] or []:
                beside = compare({**row, "arm": name}, by_size[row["requests"]])
                rows.append({**beside, "expected": of_server(record, beside)})
    print()
    show_rows(sorted(rows, key=lambda row: row["requests"]))
    for row in rows:
        if row["arm"] == NOISE:
            print(
                f"noise floor at {row['requests']} requests: time {row['time / stock']:.3f}, "
                f"other text {row['other text']}"
            )


def of_server(record: dict[str, Any], row: dict[str, Any]) -> str:
    """Aims, and where Qwen3-8B is served the model's share of learning and length of a round."""
    said = [f"{figure} {aim}" for (arm, figure), aim in AIMS.items() if arm == row["arm"]]
    kinds = [kind for kind in DRAFTS if f"serve_qwen3_8b_{kind}" in record["command"]]
    for kind in kinds:
        one = expected(kind, row["requests"], "bfloat16")
        said.append(f"ms a round {1e3 * one.round:.1f}")
        if row["versions"]:
            said.append(f"learning {one.share:.2f}")
    return ", ".join(said)
