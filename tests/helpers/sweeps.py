"""Files of sweeps over the tiny world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import TINYWORLD

EXPERIMENT = {
    "run": {"name": "grid"},
    "target": {"path": str(TINYWORLD / "target")},
    "drafter": {"kind": "eagle3", "path": f"{TINYWORLD}/${{drafter.kind}}", "window": 48},
    "workload": {"max_new_tokens": 24, "max_prompts": 1},
    "adapt": {
        "policy": {"kind": "every_n_rounds", "rounds": 4},
        "replay": {"window": 64, "anchors": 16},
    },
    "variants": {"own": {"loss": {"kind": "reverse_kl"}}},
}
TEXTS = {
    "forced": {
        "workload.documents": str(TINYWORLD / "documents" / "translated.jsonl"),
        "workload.prompts": None,
    },
    "said": {"workload.prompts": str(TINYWORLD / "prompts" / "translated.jsonl")},
}


def file(tmp_path: Path, **sections: Any) -> Path:
    """One with these axes, into ``tmp_path``."""
    raw = {
        "experiment": EXPERIMENT,
        "set": {"run.dir": str(tmp_path / "runs")},
        "record": {"dir": str(tmp_path / "traces"), "texts": {"forced": TEXTS["forced"]}},
        **sections,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path
