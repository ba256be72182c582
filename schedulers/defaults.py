"""What ``adapt`` holds where the file does not say, by how the drafter drafts.

A key at a time; but ``policy``, ``loss`` and ``guard`` have fields that go with their ``kind``, and
where the file names one they are as the file says. ``config.yaml`` in the run folder shows what
came of it. Loss, rate, steps and anchors are what did most on code and other languages with a real
model, and took nothing from chat at home (``benchmarks/results/README.md``): four steps on 32 anchors
are worth more than one on 128. The policy spends what learning earns:
``cosched bench never_worse`` shows what that costs where it earns nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosched.records import DraftType

_MEASURED: dict[str, dict[str, Any]] = {
    "policy": {
        "kind": "earned",
        "num_steps": 4,
        "rounds": 32,
    },
    "loss": {"kind": "forward_kl", "position_decay": 0.85, "rows": "delayed"},
    "trainer": {"lr": 3e-4},
    "replay": {"anchors": 32},
    "guard": {"kind": "shadow", "anchors": 16, "false_publish": 0.2},
}
# A pass that drafts all tokens learns more behind the anchors that it was asked behind, from what it drafted.
_IN_ONE_PASS = {**_MEASURED, "loss": {**_MEASURED["loss"], "rows": "accepted"}}
TABLE: dict[DraftType, dict[str, dict[str, Any]]] = {
    "chain": _MEASURED,  # EAGLE-3
    "block": _IN_ONE_PASS,  # DFlash
    "parallel": _IN_ONE_PASS,  # PARD
    "none": {"guard": {"kind": "shadow"}},  # nothing is trained
}
