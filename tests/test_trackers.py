"""Experiment trackers: what they draw, read back with their own readers, and that none stops a run."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosched.records import RoundRow
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.metrics import Turn
from cosched.telemetry.trackers.curves import EVERY, SCALARS, SHARE, Curves
from cosched.telemetry.trackers.tensorboard import TensorBoard
from cosched.telemetry.trackers.writing import MOST_WAITING, Trackers
from tests.helpers.cli import run_cli
from tests.helpers.experiments import events_of, new_folder, write
from tests.helpers.sidecar import configured, serve_until, servers, trainer
from tests.helpers.wandb_files import offline_runs

Points = dict[str, list[tuple[int, float]]]
ROW = RoundRow("r", 0, 3, num_drafted=3, num_accepted=1, num_committed=2)


class Kept:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.points.append((step, dict(scalars)))

    def close(self) -> None:
        self.closed = True


def read_back(folder: Path) -> Points:
    """Steps and values by their names, as TensorBoard reads them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def run_tracked(tmp_path: Path, settings: dict) -> tuple[Path, Any]:
    """A run of three arms on 96 tokens of two prompts, with every tracker; its folder and its summary."""
    for tracker in (trackers := ["tensorboard", "wandb"]):
        pytest.importorskip(tracker)
    settings["run"]["trackers"] = trackers
    settings["arms"] = ["plain", "frozen", "adapted"]
    settings["workload"]["max_new_tokens"] = 96
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    return folder.path, Experiment(config).run(folder)


def check_curves(points: Points, arm: str, folder: Path, summary: Any) -> None:
    """What was drawn of an arm against its summary and its events."""
    figures = summary.arms[arm]
    events = [e for e in map(json.loads, events_of(folder)) if e.get("arm") == arm]
    known = {name.replace("place_K", f"place_{k}") for name in SCALARS for k in (1, 2, 3)}
    assert points.keys() <= known
    steps = [step for step, _ in points["draft/version"]]
    assert steps[-1] == figures.rounds
    assert all(b - a >= EVERY for a, b in itertools.pairwise([0, *steps[:-1]]))
    served = [e["row"]["draft_version"] for e in events if e["kind"] == "round"]
    assert points["draft/version"][-1][1] == max(served)
    assert (max(served) > 1) == (arm == "adapted")
    assert all(value > 0 for _, value in points["speed/tokens_per_s"])
    if arm == "plain":
        assert points.keys() == {"draft/version", "speed/tokens_per_s"}
        return
    # Each point is of the rounds since the one before: together they are the arm's own figure.
    lengths = [value for _, value in points["acceptance/length"]]
    parts = [b - a for a, b in itertools.pairwise([0, *steps])]
    pooled = sum(map(float.__mul__, lengths, map(float, parts))) / figures.rounds
    assert pooled == pytest.approx(figures.tau, rel=1e-6)
    first = sum(v * n for (_, v), n in zip(points["acceptance/place_1"], parts, strict=True))
    assert first / figures.rounds == pytest.approx(figures.position_acceptance[0], rel=1e-6)
    losses = [e["result"]["losses"][0] for e in events if e["kind"] == "update"]
    drawn = [value for _, value in points.get("update/loss", [])]
    assert drawn == pytest.approx(losses, rel=1e-6)
    assert len(losses) == (figures.updates if arm == "adapted" else 0)
    if arm == "adapted":
        lr = load_config(folder / "config.yaml").adapt.trainer.lr
        assert all(value == pytest.approx(lr) for _, value in points["update/learning_rate"])
        exposed = figures.seconds["update"] + figures.seconds["publish"]
        assert points["speed/exposed_s"][-1][1] == pytest.approx(exposed, rel=1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_trackers_have_a_run_for_each_arm(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there is what the summary and the events say: as TensorBoard's own reader finds it, and in
    the files of Weights & Biases where it is offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "drafts")
    folder, summary = run_tracked(tmp_path, settings)
    arms = {path.name for path in (folder / "tensorboard").iterdir()}
    runs = offline_runs(folder, "drafts")
    assert arms == runs.keys() == {"plain", "frozen", "adapted"}
    for arm in arms:
        check_curves(read_back(folder / "tensorboard" / arm), arm, folder, summary)
        check_curves(runs[arm], arm, folder, summary)


@pytest.mark.slow
def test_a_tracker_that_cannot_write_stops_no_run(
    tmp_path: Path, settings: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the place of its folder: said once for each arm, and the run is whole."""
    pytest.importorskip("tensorboard")
    settings["run"]["trackers"] = ["tensorboard"]
    settings["arms"] = ["frozen", "adapted"]
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    (folder.path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING, "cosched"):
        summary = Experiment(config).run(folder)
    said = [one.message for one in caplog.records if "nothing more with tensorboard" in one.message]
    assert len(said) == 2
    assert summary.arms["adapted"].tokens == summary.arms["frozen"].tokens == 96


def test_what_a_resumed_run_draws_anew_takes_the_place_of_what_was_lost(tmp_path: Path) -> None:
    """Points behind the saved state were drawn before the run was killed, and are not shown twice."""
    pytest.importorskip("tensorboard")
    before = TensorBoard(tmp_path, "adapted", 0)
    for step in (32, 64, 96):
        before.write(step, {"acceptance/length": 1.0})
    before.close()
    after = TensorBoard(tmp_path, "adapted", 64)
    after.write(80, {"acceptance/length": 2.0})
    after.close()
    points = read_back(tmp_path / "tensorboard" / "adapted")
    assert points["acceptance/length"] == [(32, 1.0), (64, 1.0), (80, 2.0)]


def test_a_tracker_that_fails_is_let_go_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Others go on, and who decodes sees none of it."""

    class Failing(Kept):
        def write(self, step: int, scalars: Mapping[str, float]) -> None:
            super().write(step, scalars)
            raise OSError("disk full")

    failing, well = Failing(), Kept()
    trackers = Trackers({"failing": lambda: failing, "well": lambda: well})
    with caplog.at_level(logging.WARNING, "cosched"):
        for step in range(3):
            trackers.write(step, {"draft/version": 1.0})
        trackers.close()
    assert [one.message for one in caplog.records] == ["cosched draws nothing more with failing"]
    assert [step for step, _ in failing.points] == [0]
    assert [step for step, _ in well.points] == [0, 1, 2]
    assert well.closed
    assert not failing.closed


@pytest.mark.timeout(20)
def test_a_tracker_that_hangs_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A disk or a network that does not answer: what it has no room for is left out, and an end comes."""
    going_on = threading.Event()

    class Hanging(Kept):
        def write(self, step: int, scalars: Mapping[str, float]) -> None:
            going_on.wait(15)

    trackers = Trackers({"hanging": Hanging}, patience_s=0.1)
    with caplog.at_level(logging.WARNING, "cosched"):
        for step in range(MOST_WAITING + 10):
            trackers.write(step, {"draft/version": 1.0})
        trackers.close()
    going_on.set()
    said = [one.message for one in caplog.records]
    assert said == ["cosched leaves out points that hanging takes too long for"]


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_package_that_is_missing_is_named_with_its_command(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Before a model is loaded, by the key, as an import would find it missing."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings["run"]["trackers"] = ["tensorboard"]
    code, out, err = run_cli(command, "-c", write(tmp_path, settings))
    assert code == 2
    assert "run.trackers[0]: the package tensorboard is not installed" in out + err
    assert "pip install 'cosched[trackers]'" in out + err
    assert not (tmp_path / "runs" / "one").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["tensorboard", "tensorboard"], "the same tracker twice"),
        (["mlflow"], r"run.trackers\[0\].*mlflow"),
    ],
)
def test_a_list_of_trackers_is_checked(
    tmp_path: Path, settings: dict, value: list[str], said: str
) -> None:
    """By key, with what came."""
    settings["run"]["trackers"] = value
    with pytest.raises(ValueError, match=said):
        load_config(write(tmp_path, settings))


def test_points_take_a_small_share_of_the_time_however_slow_a_tracker_is() -> None:
    """After a point that took 0.1 s the next one is made 20 s later: half a percent."""
    now = [0.0]
    kept = Kept()
    trackers = Trackers({"kept": lambda: kept})
    curves = Curves(lr=1e-3, by_turns=False, clock=lambda: now[0])
    curves.open(trackers)
    trackers.write_seconds = slow = 0.1
    for _ in range(100 * EVERY):
        curves.observe(ROW)
        now[0] += 0.05
        trackers.write_seconds = slow
    curves.close()
    steps = [step for step, _ in kept.points]
    assert steps[0] == EVERY
    rest = slow / SHARE / 0.05
    assert all(b - a == pytest.approx(rest, abs=1) for a, b in itertools.pairwise(steps[:-1]))
    # Tokens of a server are counted by the clock, and here are 2 of them every 50 ms.
    speeds = [point["speed/tokens_per_s"] for _, point in kept.points[1:]]
    assert speeds == pytest.approx([40] * len(speeds), rel=0.01)


def test_what_a_scheduler_process_wrote_as_json_is_drawn_as_records_are() -> None:
    """Arms on SGLang are told of by a file; a loss that was not finite is null there."""
    kept = Kept()
    curves = Curves(lr=1e-3, by_turns=True)
    curves.open(Trackers({"kept": lambda: kept}))
    curves.learner = SimpleNamespace(
        counters=SimpleNamespace(update_seconds_total=2.0, publish_seconds=0.5)
    )
    curves.emit("decision", round=1, decision={"num_steps": 1, "rate_share": 0.5})
    curves.emit("update", round=1, result={"losses": [1.5, 1.25], "seconds": 0.1})
    curves.emit("update", round=2, result={"losses": [None], "seconds": 0.1})
    curves.emit("verdict", round=2, verdict={"action": "wait", "evidence_better": 0.25})
    curves.observe(ROW)
    curves.emit("turn", turn=Turn(1, 10, 2.0))
    curves.close()
    assert [point for _, point in kept.points] == [
        {"update/loss": 1.5, "update/learning_rate": 5e-4},
        {"update/learning_rate": 5e-4},
        {"guard/better": 0.25},
        {
            "acceptance/length": 2.0,
            "acceptance/place_1": 1.0,
            "acceptance/place_2": 0.0,
            "draft/version": 3,
            "speed/tokens_per_s": 5.0,
            "speed/exposed_s": 2.5,
        },
    ]


@pytest.mark.slow
@pytest.mark.long
def test_a_trainer_draws_what_its_servers_do(tmp_path: Path) -> None:
    """Losses and versions are its own, acceptance that of its servers; it waits for nobody, so nothing is exposed."""
    pytest.importorskip("tensorboard")
    config = configured(tmp_path)
    words = ("run.trackers=[tensorboard]",)
    with trainer(tmp_path, *words) as running, servers(config, 1) as one:
        serve_until(one, lambda: one[0].follower.version >= 3)
        assert running.end() == 0
    (folder,) = (tmp_path / "runs" / "many-trainer" / "tensorboard").iterdir()
    points = read_back(folder)
    assert len(points["update/loss"]) >= 3
    assert all(1 <= value <= 4 for _, value in points["acceptance/length"])
    assert points["draft/version"][-1][1] >= 2
    assert points.keys() >= {"acceptance/place_1", "speed/tokens_per_s", "update/learning_rate"}
    assert "speed/exposed_s" not in points
