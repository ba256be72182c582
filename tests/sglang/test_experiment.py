"""``engine.kind: sglang`` in an experiment: the arms of one file on the real runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cosched.records import RoundRow
from tests.sglang.serving import ROOT, WORLD

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

CODE = """
import sys
from pathlib import Path
if __name__ == "__main__":
    from cosched.config import load_config
    from cosched.experiment import Experiment
    from cosched.telemetry.run_folder import RunFolder
    config = load_config(Path("configs/sglang_tiny_cpu.yaml"), sys.argv[1:])
    folder = RunFolder(config.run_folder)
    experiment = Experiment(config)
    folder.create()
    experiment.run(folder)
"""


def test_arms_of_one_file(server_environment: dict[str, str], tmp_path: Path) -> None:
    """Same text in all arms, rounds that add up to it, and an adapted draft left as a checkpoint."""
    overrides = [
        f"run.dir={tmp_path}",
        "arms=[plain,frozen,adapted]",
        "workload.max_prompts=3",
        "workload.max_new_tokens=64",
        "adapt.policy.rounds=8",
    ]
    script = tmp_path / "experiment.py"
    script.write_text(CODE)
    process = subprocess.run(
        [sys.executable, str(script), *overrides],
        env={**server_environment, "PYTHONPATH": os.pathsep.join([str(ROOT), server_environment["PYTHONPATH"]])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-6000:]
    folder = tmp_path / "sglang_tiny_cpu"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert list(arms) == ["plain", "frozen", "adapted"]
    assert {arm["tokens"] for arm in arms.values()} == {3 * 64}
    assert {arm["lossless_mismatches"] for arm in arms.values()} == {0}
    assert arms["plain"]["tau"] == 1
    assert arms["adapted"]["tau_novel"] > arms["frozen"]["tau_novel"] > 1
    assert arms["adapted"]["versions"] == arms["adapted"]["updates"] >= 3
    assert arms["frozen"]["versions"] == 0
    assert all(arm["seconds"]["verify"] > 0 for arm in arms.values())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    rows = [RoundRow(**event["row"]) for event in events if event["kind"] == "round"]
    assert sum(row.num_committed for row in rows) == 3 * 3 * 63  # the prefill gives the first
    before = load_file(WORLD / "eagle3" / "model.safetensors")
    after = load_file(folder / "checkpoints" / "adapted" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not before["fc.weight"].equal(after["fc.weight"])
