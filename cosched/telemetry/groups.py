"""Figures of an arm group by group: requests that were decoded together, the unit that intervals are over.

Sums, not means: what is pooled over groups, files or repeats is pooled from these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.telemetry.metrics import POSITION_EDGES, GroupFigures, Place, novel_positions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cosched.telemetry.metrics import RequestLog, Turn


def figures_by_group(
    logs: Iterable[RequestLog], turns: Iterable[Turn], groups: Sequence[Sequence[str]]
) -> list[GroupFigures]:
    """Of an arm, a group's figures each; ``groups`` are the ids of the requests, in the order of time.

    A conversation's later turns, ``ID@2`` and so on, are of the group of ``ID``.
    """
    number = {name: index for index, names in enumerate(groups) for name in names}
    own: list[list[RequestLog]] = [[] for _ in groups]
    for log in logs:
        name = log.request_id
        own[number[name if name in number else name.rpartition("@")[0]]].append(log)
    seconds = [0.0] * len(groups)
    for turn in turns:
        seconds[turn.group - 1] += turn.seconds
    return [_figures(some, spent) for some, spent in zip(own, seconds, strict=True)]


def _figures(logs: Sequence[RequestLog], seconds: float) -> GroupFigures:
    sums: dict[int, list[int]] = {}
    repeated = drafted = 0
    for log in logs:
        novel, first = novel_positions([*log.prompt, *log.generated]), len(log.prompt)
        repeated += novel[first:].count(False)
        for row in log.rounds:
            start = max(edge for edge in POSITION_EDGES if edge <= row.position)
            is_novel = novel[first + row.position]
            rounds = (1, row.num_committed, int(is_novel), row.num_committed * is_novel)
            before = sums.setdefault(start, [0, 0, 0, 0])
            sums[start] = [a + b for a, b in zip(before, rounds, strict=True)]
            drafted += row.num_drafted
    return GroupFigures(
        source=logs[0].source if logs else None,
        tokens=sum(len(log.generated) for log in logs),
        repeated=repeated,
        drafted=drafted,
        seconds=seconds,
        places=[Place(start, *sums[start]) for start in sorted(sums)],
    )
