"""A run that was interrupted and went on, beside the same run in one go."""

from __future__ import annotations

from pathlib import Path

from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.metrics import ArmSummary
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.guarded_runs import SAMPLED

WHOLE, CUT = "whole", "cut"
"""Names of the two runs, and of their folders."""


def whole_and_cut(folder: Path, *overrides: str) -> tuple[ArmSummary, ArmSummary]:
    """The learning arm of both, sampled: two answers of 160 tokens, the one cut after 200 tokens."""

    def config(name: str) -> Config:
        return load_config(
            SAMPLED,
            [
                f"run.dir={folder}",
                f"run.name={name}",
                "arms=[adapted]",
                "workload.max_new_tokens=160",
                "workload.max_prompts=2",
                "adapt.policy.rounds=4",
                *overrides,
            ],
        )

    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 200:
            raise KeyboardInterrupt

    for name in (WHOLE, CUT):
        RunFolder(folder / name).create()
    expected = Experiment(config(WHOLE)).run(RunFolder(folder / WHOLE)).arms["adapted"]
    assert Experiment(config(CUT)).run(RunFolder(folder / CUT), interrupt).run["interrupted"]
    again = Experiment(config(CUT))
    return expected, again.run(RunFolder(folder / CUT), resume=True).arms["adapted"]
