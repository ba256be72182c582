"""Damaged checkpoints and saved states: refused by a clear error of ours, or loaded whole; nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosched.build.embedded import Arm
from cosched.build.resuming import go_on
from cosched.convert_checkpoint import family_of
from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.engine import EngineSeconds
from cosched.engines.embedded.target import Target
from cosched.memory.sketch import sketch
from cosched.records import RoundRow
from cosched.runs.keeping import Keeping, Point, put_back
from cosched.runs.resume import ArmProgress, Progress, RunOrigin, check_same, states_of
from cosched.runs.resume import load as load_progress
from cosched.runs.summary import Running
from cosched.settings.load import check_paths, load_config
from cosched.settings.sections import CheckpointSettings
from cosched.telemetry.metrics import RequestLog, Turn
from cosched.telemetry.run_folder import EventLog, RunFolder
from cosched.telemetry.saved_states import SUMS, SavedStates, _sums
from cosched.testing.harness import make_target
from tests.helpers.checkpoints import FAMILIES, load, save
from tests.helpers.fuzz import cases, damaged_file, little_memory, nothing_written, only_ours
from tests.helpers.learners import ORIGIN, learner, save_now, some_rounds, tell
from tests.helpers.paths import QUICKSTART, TINYWORLD

EXAMPLES = {"eagle3": "reduced vocabulary", "dflash": "plain", "pard": "qwen3"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_damaged_draft_is_one_clear_error(tmp_path: Path, target: Target, kind: str) -> None:
    """Its configuration and the header of its weights; what is loaded drafts with finite weights or not,
    but it is a draft for this target."""
    save(target, kind, EXAMPLES[kind], tmp_path)
    files = [tmp_path / "config.json", *tmp_path.glob("*.safetensors")]
    with little_memory():
        for case, rng in cases(f"draft {kind}", 50, share=1 / 3):
            path = rng.choice(files)
            put_back = damaged_file(rng, path)
            came = path.read_bytes()[:800] if path.exists() else b""
            with nothing_written(tmp_path), only_ours(case, (path.name, came)):
                family_of(tmp_path)
                drafter = load(kind, tmp_path, target)
                assert drafter.network() is not None
            put_back()
    load(kind, tmp_path, target)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_damaged_model_is_told_by_its_sizes(tmp_path: Path, kind: str) -> None:
    """``cosched check`` reads ``config.json`` of target and draft before anything is loaded."""
    for name, source in (("target", TINYWORLD / "target"), ("draft", TINYWORLD / kind)):
        (tmp_path / name).mkdir()
        for path in source.iterdir():
            if path.suffix == ".json":
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
            else:
                (tmp_path / name / path.name).symlink_to(path)
    words = [
        f"target.path={tmp_path / 'target'}", f"drafter.path={tmp_path / 'draft'}",
        f"drafter.kind={kind}", f"workload.documents={TINYWORLD / 'prompts' / 'translated.jsonl'}",
        "workload.prompts=null",
    ]  # fmt: skip
    files = [tmp_path / name / "config.json" for name in ("target", "draft")]
    with little_memory():
        for case, rng in cases(f"sizes {kind}", 12, share=1 / 3):
            path = rng.choice(files)
            put_back = damaged_file(rng, path)
            came = path.read_bytes()[:800] if path.exists() else b""
            with nothing_written(tmp_path), only_ours(case, (path.parent.name, came)):
                config = load_config(QUICKSTART, words)
                check_paths(config)
                sketch(config)
            put_back()


# --- saved states -------------------------------------------------------------------------------


def damage_state(rng: random.Random, states: SavedStates) -> tuple[str, Any]:
    """One file of the newest state; one time of two its sums are made to fit, as a forger would."""
    state = states.newest()
    assert state is not None
    files = [path for path in state.rglob("*") if path.is_file() and path.name != SUMS]
    files += [states.folder / "newest", state / SUMS] if rng.random() < 0.2 else []
    path = rng.choice(files)
    sums = (state / SUMS).read_bytes()
    put_back = damaged_file(rng, path)
    if rng.random() < 0.7 and path in state.rglob("*") and path.name != SUMS:
        (state / SUMS).write_text(_sums(state))

    def all_back() -> None:
        put_back()
        (state / SUMS).write_bytes(sums)

    return path.name, all_back


@pytest.fixture(scope="module")
def learnt() -> Coscheduler:
    one = learner(make_target())
    tell(one, some_rounds()[:40])
    assert one.version > 1
    return one


def test_a_damaged_state_of_a_server_is_one_clear_error(
    tmp_path: Path, learnt: Coscheduler
) -> None:
    """Also where somebody has made its checksums fit: no code is run, and no shape is
    taken at its word."""
    save_now(learnt, tmp_path)
    states, again = SavedStates(tmp_path), learner(make_target())
    with little_memory():
        for case, rng in cases("state", 100):
            name, put_back = damage_state(rng, states)
            with nothing_written(tmp_path), only_ours(case, name):
                state = states.newest()
                assert state is not None
                go_on(again, state, ORIGIN, 0)
            put_back()
    state = states.newest()
    assert state is not None
    go_on(again, state, ORIGIN, 0)
    assert again.version == learnt.version


def test_a_damaged_state_of_a_run_is_one_clear_error(tmp_path: Path, learnt: Coscheduler) -> None:
    """The same of what an interrupted run goes on from: figures, counters, tensors, the log's length."""
    folder, origin = RunFolder(tmp_path), RunOrigin("t", "x", {"adapted": "d"})
    events = tmp_path / "events.jsonl"
    events.write_bytes(b"{}\n" * 10)
    counters, version, tensors = learnt.state()
    log = RequestLog("a", [1, 2], [3, 4], (RoundRow("a", 0, 1, 4, 2, 3),), True)
    arm = ArmProgress([log], 1.0, EngineSeconds(), counters, version, [Turn(1, 2, 0.5)])
    keeping = Keeping(folder, CheckpointSettings())
    keeping.behind_group(
        {}, lambda: Point(Progress(1, 30, {"adapted": arm}, origin), {"adapted": tensors})
    )
    states = states_of(folder)
    running = Running(
        Arm("adapted", SimpleNamespace(seconds=EngineSeconds()), None, learner(make_target()))
    )  # type: ignore[arg-type]
    with little_memory():
        for case, rng in cases("run", 100):
            name, put_all_back = damage_state(rng, states)
            with nothing_written(states.folder), only_ours(case, name):
                progress, found = load_progress(folder)
                check_same(progress, origin, {"adapted"}, folder)
                put_back([running], progress, found)
                log_ = EventLog()
                log_.open(events, keep_bytes=progress.events_bytes)
                log_.close()
            assert events.stat().st_size <= 30, f"input {case}: a log that grew"
            events.write_bytes(b"{}\n" * 10)
            put_all_back()
