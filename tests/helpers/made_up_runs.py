"""A run's folder with made-up rounds, whose figures are computed as in a real run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec

from cosched.records import RoundRow, Verdict
from cosched.report.html import write_report
from cosched.report.intervals import cut
from cosched.settings.arms import adapts
from cosched.telemetry.metrics import ArmSummary, RequestLog, RunSummary, Turn, round_figures

if TYPE_CHECKING:
    from pathlib import Path


ALL_ARMS = ("plain", "frozen", "frozen+window", "adapted", "adapted+window")
CHANCE = {"frozen": 0.4, "frozen+window": 0.5, "adapted": 0.7, "adapted+window": 0.7}
TEXT = "<script>alert('x')</script> & more \x1b[0m"
SPEEDS = {"plain": 100.0, "frozen": 150.0, "frozen+window": 160.0, "adapted": 180.0}


class EventLines(list[bytes]):
    """``events.jsonl`` in the making."""

    def emit(self, kind: str, **fields: object) -> None:
        self.append(msgspec.json.encode({"kind": kind, **fields}) + b"\n")


def make_run(
    folder: Path,
    arms: tuple[str, ...] = ALL_ARMS,
    num_requests: int = 3,
    speeds: dict[str, float] | None = None,
    losses: tuple[float, ...] = (0.5, 0.4),
    **run: object,
) -> RunSummary:
    """A run folder with made-up rounds whose figures are computed as in a real run."""
    folder.mkdir(exist_ok=True)
    log = EventLines()
    found: dict[str, ArmSummary] = {}
    for arm in arms:
        logs = [_request(arm, f"p{number}", log) for number in range(num_requests)]
        if adapts(arm):
            for version, loss in enumerate(losses, 1):
                _update(log, arm, version, loss)
        found[arm] = summary_of(arm, logs, (speeds or SPEEDS).get(arm, 90.0), losses)
    parts, parts_of = cut({arm: _turns(arm, one, num_requests) for arm, one in found.items()})
    for arm, own in parts.items():
        found[arm].parts = own
        for turn in _turns(arm, found[arm], num_requests):
            log.emit("turn", arm=arm, turn=turn)
    (folder / "events.jsonl").write_bytes(b"".join(log))
    facts = {"name": "made up", "engine": "embedded", "text": "greedy", "interrupted": False}
    facts |= {"lossless_reference": arms[0] if arms else None, "seconds": 1.5}
    facts |= {"parts_of": parts_of, "command": "cosched run -c <made_up>.yaml"}
    summary = RunSummary(run=facts | run, arms=found)
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    (folder / "config.yaml").write_text("run:\n  name: <made up>\nengine:\n  max_batch: 1\n")
    return summary


def _request(arm: str, name: str, log: EventLines) -> RequestLog:
    rng = random.Random(f"{arm} {name}")
    drafted = 0 if arm == "plain" else 3
    tokens = [rng.randrange(1000) for _ in range(150)]
    rows: list[RoundRow] = []
    position = 1
    while position < len(tokens):
        accepted = 0
        while accepted < drafted and rng.random() < CHANCE[arm.split(".")[-1]]:
            accepted += 1
        committed = min(accepted + 1, len(tokens) - position)
        version = min(2, position // 50) if adapts(arm) else 0
        rows.append(RoundRow(name, position, version, drafted, accepted, committed))
        position += committed
    for row in rows:
        log.emit("round", arm=arm, row=row)
    log.emit("request", arm=arm, id=name, text=TEXT + f" {name}")
    return RequestLog(name, [1, 2, 3], tokens, rows)


def _update(log: EventLines, arm: str, version: int, loss: float) -> None:
    log.emit("update", arm=arm, round=10 * version, result={"losses": [loss, loss / 2]})
    verdict = Verdict("publish", evidence_better=0.6 * version, evidence_worse=-0.3 * version)
    log.emit("verdict", arm=arm, round=10 * version, verdict=verdict)
    log.emit("publication", arm=arm, round=10 * version, version={"version": version})


def summary_of(
    arm: str, logs: list[RequestLog], speed: float, losses: tuple[float, ...]
) -> ArmSummary:
    figures = round_figures(logs)
    adapted = adapts(arm)
    wall = figures.tokens / speed
    seconds = {
        "prefill": 0.05,
        "draft": 0.1,
        "verify": 0.6,
        "update": 0.2 * adapted,
        "publish": 0.0,
    }
    seconds = {stage: share * wall for stage, share in seconds.items()} | {"wall": wall}
    return ArmSummary(
        **msgspec.structs.asdict(figures),
        tokens_per_s=speed if figures.tokens else 0.0,
        seconds=seconds,
        lossless_mismatches=0,
        versions=2 * adapted,
        updates=2 * adapted,
        skipped_steps=0,
        losses=list(losses) if adapted else [],
        peak_bytes=1 << 20,
    )


def _turns(arm: str, summary: ArmSummary, num_requests: int) -> list[Turn]:
    """Ten of each request, not all equally fast; together they take the arm's wall time."""
    rng = random.Random(arm)
    shares = [rng.uniform(0.98, 1.02) for _ in range(10 * num_requests)]
    seconds = summary.seconds["wall"] / sum(shares)
    stages = {
        stage: s / summary.seconds["wall"]
        for stage, s in summary.seconds.items()
        if stage != "wall"
    }
    return [
        Turn(
            turn // 10 + 1,
            15,
            share * seconds,
            {stage: part * share * seconds for stage, part in stages.items()},
        )
        for turn, share in enumerate(shares)
    ]


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")
