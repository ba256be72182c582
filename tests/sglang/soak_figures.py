"""What came of a soak: figures, and what of them is not as it must be."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.helpers.resident import SETTLE_S, WATCHED_S
from tests.sglang.traffic import LIMIT_S

MOST_SLOPE = 1.0  # MiB a minute
WATCHED = ("HTTP server", "scheduler", "detokenizer")  # for as long as the server lives


@dataclass
class Figures:
    """What was asked for, and what came of it."""

    placement: str
    minutes: float
    begun: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    requests: dict[str, int] = field(default_factory=dict)  # by kind
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)  # median and most
    by_client: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)  # of the fixed prompt
    lost: dict[str, int] = field(default_factory=dict)  # trainers, by signal
    versions: list[int] = field(default_factory=list)  # as looked at, in turn
    updates: list[int] = field(default_factory=list)
    learnt: int = 0  # versions that no rollback has made
    acceptance_length: float | None = None
    warnings: list[str] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)  # that the processes ended with
    left: list[str] = field(default_factory=list)

    @property
    def slowest_s(self) -> float:
        return max(most for _, most in self.seconds.values())

    def wrong(self) -> Iterator[str]:
        """All that must not be."""
        yield from self.failures[:5]
        yield from self.left
        if len(self.texts) != 1:
            yield f"the fixed prompt was answered in {len(self.texts)} ways: {self.texts}"
        if self.slowest_s > LIMIT_S:
            yield f"a request took {self.slowest_s:.0f} s"
        fewest, most = min(self.by_client.values()), max(self.by_client.values())
        if 3 * fewest < most:  # they draw from the same kinds
            yield f"one client has had {fewest} answers, another {most}"
        if self.versions != sorted(self.versions):
            yield f"the version went back: {self.versions}"
        if self.learnt < 1 or self.updates[-1] <= self.updates[len(self.updates) // 2]:
            yield f"it has not gone on learning: {self.learnt} versions, updates {self.updates}"
        yield from (f"{name} ended with {code}" for name, code in self.codes.items() if code)
        yield from self._of_memory()

    def _of_memory(self) -> Iterator[str]:
        if 60 * self.minutes < SETTLE_S + WATCHED_S + 30:
            return
        for role in WATCHED:
            if not any(one["role"] == role and one["slope"] is not None for one in self.memory):
                yield f"{role}: nobody has watched it"
        for one in self.memory:
            if (one["slope"] or 0.0) > MOST_SLOPE:
                yield f"{one['role']} grows by {one['slope']:.2f} MiB a minute"

    def table(self) -> Table:
        """For people."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.requests.items())
        clients = sorted(self.by_client.values())
        slopes = [
            f"{one['role']} {one['slope']:+.2f} (at {one['mebibytes'][-1]:.0f} MiB)"
            for one in self.memory
            if one["slope"] is not None
        ]
        table = Table("what", "figure", title=f"soaked for {self.minutes:g} min, {self.placement}")
        for row in (
            ("asked for", f"{sum(self.requests.values())}: {kinds}"),
            ("answers of one client, fewest, most", f"{clients[0]}, {clients[-1]}"),
            ("seconds of the slowest", f"{self.slowest_s:.1f}"),
            ("failures", str(len(self.failures))),
            ("texts of the fixed prompt", f"{len(self.texts)} in {sum(self.texts.values())}"),
            ("trainers lost", ", ".join(f"{n} {how}" for how, n in self.lost.items()) or "0"),
            ("draft version, updates", f"{self.versions[-1]}, {self.updates[-1]}"),
            ("versions learnt", str(self.learnt)),
            ("MiB a minute behind the first five", ", ".join(slopes) or "not watched for so long"),
            ("left", "\n".join(self.left) or "nothing"),
        ):
            table.add_row(*row)
        return table

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
