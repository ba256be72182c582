"""What ``adapt`` holds where the file does not say, by how the drafter drafts.

``policy`` and ``loss`` stand in for a section that the file leaves out as a whole; of the others a
key at a time. ``config.yaml`` in the run folder shows what came of it. Loss, rate and anchors are
those of the sweeps in ``configs/sweep_*.yaml`` (``benchmarks/results/README.md``): what was best at
the same cost on text of both kinds, which turned out to be the same for all three. The policy is the
one that never lost in ``benchmarks/bench_never_worse.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosched.records import DraftType

TABLE: dict[DraftType, dict[str, dict[str, Any]]] = {
    "chain": {  # EAGLE-3
        "policy": {"kind": "earned"},
        "loss": {"kind": "jensen_shannon", "position_decay": 0.85, "rows": "delayed"},
        "trainer": {"lr": 3e-4},
        "replay": {"anchors": 64},
    },
    "block": {  # DFlash
        "policy": {"kind": "earned"},
        "loss": {"kind": "jensen_shannon", "position_decay": 0.85, "rows": "delayed"},
        "trainer": {"lr": 3e-4},
        "replay": {"anchors": 64},
    },
    "parallel": {  # PARD
        "policy": {"kind": "earned"},
        "loss": {"kind": "jensen_shannon", "position_decay": 0.85, "rows": "delayed"},
        "trainer": {"lr": 3e-4},
        "replay": {"anchors": 64},
    },
    "none": {},  # nothing is trained
}
