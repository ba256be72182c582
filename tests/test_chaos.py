"""Killed at random moments, a run goes on each time: nothing is damaged, nothing goes back, nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from tests.helpers.chaos import Chaos, texts_of
from tests.helpers.experiments import new_folder, write

MOMENTS = int(os.environ.get("COSCHED_CHAOS", "3"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(120 + 60 * MOMENTS)
def test_a_run_is_killed_at_random_moments(
    tmp_path: Path, settings: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run, its trainer, or both, by SIGKILL, and a trainer that hangs. ``make chaos`` takes forty moments
    and shows the figures."""
    settings["workload"] |= {"max_new_tokens": 96, "samples": 2, "max_prompts": 8}
    settings["arms"] = ["adapted"]
    settings["adapt"]["trainer"] = {"background": True, "limit_seconds": 3, "restarts": 1000}
    settings["adapt"]["checkpoint"] = {"keep": 3}
    path = write(tmp_path, settings)
    alone = load_config(path, ["run.name=alone", "arms=[plain]"])
    Experiment(alone).run(new_folder(alone))
    chaos = Chaos(path, tmp_path / "runs" / "one", texts_of(alone.run_folder), seed=18)
    figures = chaos.run(MOMENTS)
    with capsys.disabled():
        if "COSCHED_CHAOS" in os.environ:
            Console().print(figures.table())
    assert figures.moments >= MOMENTS
    assert figures.finished >= 1
    assert not figures.failures, figures.failures[0]
    assert not figures.left, figures.left
    assert figures.states_back == figures.damaged == figures.other_texts == 0
    assert max(figures.groups_lost, default=0) <= 1  # the one that was going on, and no more
