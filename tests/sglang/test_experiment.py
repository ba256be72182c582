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
    from cosched.settings.load import load_config
    from cosched.runs.experiment import Experiment
    from cosched.telemetry.run_folder import RunFolder
    config = load_config(Path("configs/sglang_tiny_cpu.yaml"), sys.argv[1:])
    folder = RunFolder(config.run_folder)
    experiment = Experiment(config)
    folder.create()
    experiment.run(folder)
"""


def run_experiment(
    overrides: list[str], tmp_path: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """``configs/sglang_tiny_cpu.yaml`` with these changes, in a process of its own."""
    script = tmp_path / "experiment.py"
    script.write_text(CODE)
    return subprocess.run(
        [sys.executable, str(script), *overrides],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_arms_of_one_file(server_environment: dict[str, str], tmp_path: Path) -> None:
    """Same text in all arms, rounds that add up to it, and an adapted draft left as a checkpoint."""
    overrides = [
        f"run.dir={tmp_path}",
        "arms=[plain,frozen,adapted]",
        "workload.max_prompts=3",
        "workload.max_new_tokens=64",
        "adapt.policy.rounds=8",
    ]
    process = run_experiment(overrides, tmp_path, server_environment)
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


def test_arms_answer_conversations(server_environment: dict[str, str], tmp_path: Path) -> None:
    """Several turns, each with the arm's own answer before it, the same in all arms; and the target
    by its name in the Hugging Face cache, which SGLang itself would go and ask the Hub for."""
    model = tmp_path / "hub" / "models--cosched--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "snapshots").mkdir()
    (model / "refs" / "main").write_text("main")
    (model / "snapshots" / "main").symlink_to(WORLD / "target")
    asks = ["NAME\nls - list\n", "NAME\ncp - copy\n", "NAME\nmv - move\n"]
    lines = [
        {"id": name, "messages": [{"role": "user", "content": ask} for ask in asks[:number]]}
        for name, number in (("a", 3), ("b", 1), ("c", 2))
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    overrides = [
        f"run.dir={tmp_path}",
        "arms=[plain,frozen]",
        "target.path=cosched/tiny",
        f"workload.prompts={prompts}",
        "workload.turns=3",
        "workload.max_new_tokens=24",
    ]
    process = run_experiment(
        overrides, tmp_path, {**server_environment, "HF_HUB_CACHE": str(tmp_path / "hub")}
    )
    assert process.returncode == 0, process.stderr[-6000:]
    folder = tmp_path / "sglang_tiny_cpu"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert {(arm["requests"], arm["lossless_mismatches"]) for arm in arms.values()} == {(6, 0)}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    said = [event["id"] for event in events if event["kind"] == "request"]
    assert said == 2 * ["a", "b", "c", "a@2", "c@2", "a@3"]
