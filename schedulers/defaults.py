"""What ``adapt`` holds where the file does not say, by how the drafter drafts.

A key at a time; but ``policy``, ``loss`` and ``guard`` have fields that go with their ``kind``, and
where the file names one they are as the file says. ``config.yaml`` in the run folder shows what
came of it. Loss, rate and anchors are those of the sweeps in ``configs/sweep_*.yaml``
(``benchmarks/results/README.md``): what was best at the same cost on text of both kinds, which
turned out to be the same for all three. The policy spends what learning earns:
``benchmarks/bench_never_worse.py`` shows what that costs where it earns nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosched.records import DraftType

_SWEPT: dict[str, dict[str, Any]] = {
    "policy": {"kind": "earned"},
    "loss": {"kind": "jensen_shannon", "position_decay": 0.85, "rows": "delayed"},
    "trainer": {"lr": 3e-4},
    "replay": {"anchors": 64},
    "guard": {"kind": "shadow"},
}
TABLE: dict[DraftType, dict[str, dict[str, Any]]] = {
    "chain": _SWEPT,  # EAGLE-3
    "block": _SWEPT,  # DFlash
    "parallel": _SWEPT,  # PARD
    "none": {"guard": {"kind": "shadow"}},  # nothing is trained
}
