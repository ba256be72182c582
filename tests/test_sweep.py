"""Sweeps: what is run, what is kept, and what the results say."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import msgspec
import pytest

from cosched.sweep.plan import AxisInfo, load_plan
from cosched.sweep.pool import Event, Pool
from cosched.sweep.results import CellResult, SweepSummary, effects, points
from cosched.sweep.sweep import Sweep
from tests.helpers.cli import cosched_process, heed_ctrl_c, run_cli
from tests.helpers.sweeps import file

# --- what the results say ------------------------------------------------------------------


def cell(gain: float | None, text: str = "a", **settings: str) -> CellResult:
    numbers = dict.fromkeys(CellResult.__struct_fields__, 0)
    words = {"id": "x", "drafter": "eagle3", "text": text, "arm": "adapted", "settings": settings}
    return msgspec.convert({**numbers, **words, "gain_novel": gain}, CellResult, strict=False)


def summary(cells: list[CellResult], **axes: AxisInfo) -> SweepSummary:
    return SweepSummary(sweep={}, axes=axes, cells=cells, failures=[], num_missing=0)


def test_points_are_means_over_texts_the_best_first() -> None:
    found = points(
        summary(
            [
                cell(0.1),
                cell(0.3, "b"),
                cell(0.4, lr="1"),
                cell(0.2, "b", lr="1"),
                cell(None, k="0"),
            ]
        )
    )["eagle3"]
    assert [(p.label, round(p.gain, 6)) for p in found] == [("lr=1", 0.3), ("all as set", 0.2)]
    assert found[0].by_text == {"a": 0.4, "b": 0.2}


def test_effects_around_are_against_the_centre_and_in_a_grid_against_the_mean() -> None:
    """The centre is what holds elsewhere, at every point of the grid."""
    cells = [
        cell(gain, loss=loss, **more)
        for loss, base in (("f", 0.1), ("r", 0.3))
        for gain, more in ((base, {}), (base + 0.02, {"lr": "2"}))
    ]
    found = effects(summary(cells, loss=AxisInfo(["f", "r"], None), lr=AxisInfo(["1", "2"], "1")))
    assert [
        (e.axis, e.label, round(e.gain, 6), round(e.difference, 6), e.num_points, e.is_default)
        for e in found
    ] == [
        ("loss", "f", 0.11, -0.1, 2, False),
        ("loss", "r", 0.31, 0.1, 2, False),
        ("lr", "1", 0.2, 0.0, 2, True),
        ("lr", "2", 0.22, 0.02, 2, False),
    ]


# --- running -------------------------------------------------------------------------------

RATES = {"adapt.trainer.lr": [1e-3, 1e-2]}


def read(folder: Path) -> SweepSummary:
    return msgspec.json.decode((folder / "sweep.json").read_bytes(), type=SweepSummary)


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    """Figures of every cell, a page that needs nothing else, and nothing to run a second time.

    One cell cannot be built and is named; the others are not stopped by it, and exit code 1 says
    that there is one. A half-done cell is done again, the rest is not touched.
    """
    grid = {**RATES, "adapt.memory.max_bytes": [1 << 28, 1000]}
    path, folder = file(tmp_path, grid=grid), tmp_path / "runs" / "grid"
    code, out, err = run_cli("sweep", "-c", path, "--jobs", "2")
    assert code == 1, err
    assert err.count("failed") == 2
    assert "adapt.memory.max_bytes: 1000 holds no request" in err
    assert "4 cells, 1 controls, 1 texts; 6 to run, 0 known" in out
    assert "2 best of 2 points" in out
    found = read(folder)
    assert len(found.cells) == len(found.failures) == 2
    for one in found.cells:
        figures = json.loads((folder / "cells" / one.id / "summary.json").read_text())
        arm = figures["arms"]["adapted"]
        assert (one.tau, one.tokens) == (arm["tau"], 24)
        assert one.updates > 0
        assert one.gain_novel == pytest.approx(one.tau_novel / one.tau_frozen_novel - 1)
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "holds no request" in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)

    code, _, err = run_cli("sweep", "-c", path)
    assert (code, "--overwrite" in err) == (1, True)
    kept, undone = (folder / "cells" / one.id for one in found.cells)
    before = (kept / "summary.json").stat().st_mtime_ns
    (undone / "summary.json").unlink()
    fine = file(tmp_path, grid={**RATES, "adapt.memory.max_bytes": [1 << 28]})
    code, out, err = run_cli("sweep", "-c", fine, "--resume", "--jobs", "1")
    assert code == 0, err
    assert "1 to run, 3 known" in out
    assert (kept / "summary.json").stat().st_mtime_ns == before
    again = read(folder)
    assert [(c.id, c.tau_novel) for c in again.cells] == [(c.id, c.tau_novel) for c in found.cells]


def test_a_folder_that_is_no_sweep_stays(tmp_path: Path) -> None:
    stranger = tmp_path / "runs" / "grid"
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("do not delete")
    path = file(tmp_path, grid=RATES)
    for flag in ("--overwrite", "--resume", None):
        code, _, err = run_cli("sweep", "-c", path, *([flag] if flag else []))
        assert (code, (stranger / "thesis.txt").exists()) == (1, True), err
    code, _, err = run_cli("sweep", "-c", path, "--overwrite", "--resume")
    assert (code, "--resume" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.long
def test_a_worker_that_dies_is_one_failed_job(tmp_path: Path) -> None:
    """Killed in the middle, as for want of memory: named with its signal; the next job has another."""
    plan = load_plan(file(tmp_path, grid=RATES))
    (recording,) = plan.recordings.values()
    pool = Pool(1, tmp_path / "logs")
    kinds: list[str] = []

    def kill_first(event: Event) -> None:
        kinds.append(event.kind)
        if kinds == ["total"]:
            pool._processes[0].kill()

    try:
        failures = pool.run([recording, recording], kill_first)
    finally:
        pool.close()
    assert "killed by signal 9" in failures[recording.id]
    assert "worker-0.log" in failures[recording.id]
    assert kinds.index("error") < kinds.index("done")


@pytest.mark.slow
@pytest.mark.long
def test_cells_of_a_text_that_was_not_recorded_fail(tmp_path: Path) -> None:
    """They say why, and no worker is started for them."""
    said = tmp_path / "said.jsonl"
    said.write_text("no JSON\n")
    record = {"dir": str(tmp_path / "traces"), "texts": {"bad": {"workload.prompts": str(said)}}}
    plan = load_plan(file(tmp_path, grid=RATES, record=record))
    plan.folder.mkdir(parents=True)
    ended = []
    found = Sweep(plan, 1).run(lambda event: ended.append(event.job.id))
    assert len(ended) == 1
    assert len(found.failures) == 2
    assert all("was not recorded: workload.prompts: line 1" in f.message for f in found.failures)


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_keeps_the_cells_that_are_done(tmp_path: Path) -> None:
    """SIGINT in the middle: exit code 1, no worker left, a report of what there is; then the rest."""
    path = file(tmp_path, grid={"adapt.trainer.lr": [1e-4, 1e-3, 3e-3, 1e-2]})
    longer = ["workload.max_new_tokens=160"]
    folder = tmp_path / "runs" / "grid"
    process = cosched_process(["sweep", "-c", str(path), "--jobs", "1", *longer], heed_ctrl_c)
    deadline = time.monotonic() + 200
    while len(list(folder.glob("cells/*/summary.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "--resume" in err
    assert "Traceback" not in err
    cut = read(folder)
    assert cut.sweep["interrupted"]
    assert len(cut.cells) + cut.num_missing == 4
    assert cut.num_missing
    assert (folder / "report.html").exists()
    code, _, err = run_cli("sweep", "-c", path, "--jobs", "1", "--resume", *longer)
    assert code == 0, err
    done = read(folder)
    assert (len(done.cells), done.num_missing) == (4, 0)
    assert done.sweep["known"] >= 1 + 2  # the recording, and what had been done


@pytest.mark.slow
@pytest.mark.long
def test_a_cell_is_a_run_of_its_own(tmp_path: Path) -> None:
    """A worker that has run others gives the figures that ``cosched run`` gives on the same trace."""
    path = file(tmp_path, grid=RATES)
    code, _, err = run_cli("sweep", "-c", path, "--jobs", "1")
    assert code == 0, err
    folder = tmp_path / "runs" / "grid"
    last = read(folder).cells[-1]
    config = folder / "cells" / last.id / "config.yaml"
    code, _, err = run_cli("run", "-c", config, "run.name=alone", f"run.dir={tmp_path}")
    assert code == 0, err
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())["arms"]["adapted"]
    assert (alone["tau"], alone["tau_novel"], alone["updates"]) == (
        last.tau,
        last.tau_novel,
        last.updates,
    )
