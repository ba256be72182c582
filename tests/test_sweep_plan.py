"""Sweeps: what a file stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosched.errors import CoschedError
from cosched.settings.sections import AdaptSettings
from cosched.sweep.plan import Plan, load_plan
from cosched.sweep.results import named
from tests.helpers.cli import run_cli
from tests.helpers.paths import ROOT
from tests.helpers.sweeps import TEXTS, file

REAL_MODEL = (
    pytest.mark.realworld,
    pytest.mark.skipif(not (ROOT / "models").is_dir(), reason="cosched realworld fetch"),
)
SWEEPS = sorted((ROOT / "configs").glob("sweep_*.yaml"))


def settings(plan: Plan) -> list[str]:
    return [named(cell.settings) for cell in plan.cells]


def test_the_grid_is_a_cross_product(tmp_path: Path) -> None:
    """Every drafter at every rate on every text; the frozen arms once a drafter and text."""
    grid = {"drafter.kind": ["eagle3", "pard"], "adapt.trainer.lr": [1e-4, 1e-3]}
    record = {"dir": str(tmp_path / "traces"), "texts": TEXTS}
    plan = load_plan(file(tmp_path, grid=grid, record=record))
    assert len(plan.cells) == 2 * 2 * 2
    assert len({cell.job.id for cell in plan.cells}) == 8
    assert len(plan.controls) == 2 * 2
    assert list(plan.recordings) == ["forced", "said"]
    for cell in plan.cells:
        config = cell.job.config
        assert config.drafter_settings.kind == cell.settings["drafter.kind"] == cell.drafter
        assert f"{config.adapt.trainer.lr:g}" == cell.settings["adapt.trainer.lr"]
        assert config.engine.trace == str(plan.recordings[cell.text].config.run_folder / "trace")
        control = plan.controls[cell.control].config
        assert control.arms == ("frozen", "frozen+window")
        assert control.drafter == config.drafter
        assert control.engine == config.engine
        assert control.adapt == AdaptSettings()
    recorded = plan.recordings["said"].config
    assert recorded.arms == ("plain",)
    assert recorded.record.feature_layers == (1, 7, 12)  # EAGLE-3's; PARD needs none


def test_around_changes_one_setting_at_a_time(tmp_path: Path) -> None:
    """The base point first; a bundle of settings has a name; other kinds leave no old fields."""
    around = {
        "adapt.trainer.lr": [3e-4, 1e-3],  # the first is what the file has: no second cell of it
        "cadence": {"tokens": {"adapt.policy.kind": "every_n_tokens", "adapt.policy.tokens": 9}},
        "arm": ["own+window"],
    }
    plan = load_plan(file(tmp_path, around=around))
    assert settings(plan) == [
        "all as set", "adapt.trainer.lr=0.001", "cadence=tokens", "arm=own+window",
    ]  # fmt: skip
    rate, cadence, arm = (cell.job.config for cell in plan.cells[1:])
    assert rate.adapt.trainer.lr == 1e-3
    assert cadence.policy_settings.tokens == 9
    assert arm.arms == ("own+window",)
    assert len(plan.controls) == 1
    assert {name: axis.default for name, axis in plan.axes.items()} == {
        "adapt.trainer.lr": "0.0003", "cadence": "as set", "arm": "adapted",
    }  # fmt: skip


def test_around_each_point_of_a_grid_and_cells_of_their_own(tmp_path: Path) -> None:
    plan = load_plan(
        file(
            tmp_path,
            grid={"adapt.loss.kind": ["forward_kl", "reverse_kl"]},
            around={"adapt.trainer.lr": [1e-3]},
            cells={"tail, slow": {"adapt.scope.kind": "tail", "adapt.trainer.lr": 1e-4}},
        )
    )
    assert settings(plan) == [
        f"adapt.loss.kind={loss}{more}"
        for loss in ("forward_kl", "reverse_kl")
        for more in ("", ", adapt.trainer.lr=0.001", ", cells=tail, slow")
    ]
    assert plan.cells[-1].job.config.adapt.scope.kind == "tail"


def test_ids_follow_the_settings(tmp_path: Path) -> None:
    """What changes a result changes the id of what it concerns, and nothing else does."""

    def ids(*overrides: str) -> tuple[set[str], set[str], set[str]]:
        plan = load_plan(file(tmp_path, grid={"adapt.trainer.lr": [1e-3]}), overrides)
        cells = {cell.job.id for cell in plan.cells}
        return cells, set(plan.controls), {job.id for job in plan.recordings.values()}

    before = ids()
    assert ids("run.name=another", f"run.dir={tmp_path / 'elsewhere'}") == before
    slower = ids("adapt.trainer.weight_decay=0.1")
    assert [a == b for a, b in zip(slower, before, strict=True)][:2] == [False, True]
    longer = ids("workload.max_new_tokens=25")
    assert all(a.isdisjoint(b) for a, b in zip(longer, before, strict=True))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"grid": {"adapt.trainer.lr": []}}, r"^grid\.adapt\.trainer\.lr: .*length >= 1"),
        ({"grid": {"arm": ["own"], "adapt.trainer.lr": 3}}, r"^grid\.adapt\.trainer\.lr: .*got 3"),
        ({"record": {"texts": {"a": TEXTS["said"], "b": 3}}}, r"^record\.texts\.b: .*got 3"),
        ({"grid": {"adapt.trainer.lr": [-1]}}, r"adapt.trainer.lr=-1: adapt.trainer.lr: .*got -1"),
        ({"grid": {"adapt.triner.lr": [1]}}, r"adapt.triner.lr=1: adapt: .*triner.*trainer"),
        ({"around": {"loss": {"x": {"adapt.loss.kind": "y"}}}}, r"loss=x: adapt.loss.kind: .*'y'"),
        ({"around": {"adapt.loss.rows": ["all"]}}, r"adapt.loss.rows=all: .*a trace does not have"),
        ({"around": {"arm": ["frozen"]}}, r"arm=frozen: arm: 'frozen' does not learn"),
        ({"around": {"arm": ["other"]}}, r"arm=other: arms: unknown arm 'other'; .*own"),
        ({"around": {"a": {"x": {}}}, "grid": {"a": {"x": {}}}}, r"around.a: stands in grid"),
        ({"grids": {}}, r"grids.*allowed here: .*grid"),
        (
            {"around": {"a": [1], "b": {"x": 3}}, "rec": {}},  # two mistakes: the first is told
            r"^around\.b\.x: .*object.*got 3",
        ),
        ({"base": "x.yaml"}, r"exactly one of base"),
        ({"experiment": None}, r"exactly one of base"),
        ({"experiment": None, "base": "nowhere.yaml"}, r"no configuration file at .*nowhere"),
        ({"record": {"texts": {}}}, r"record.texts"),
        ({"record": {"texts": {"a b": TEXTS["said"]}}}, r"record.texts.a b: "),
        ({"record": {"texts": {"a": {}}}}, r"record.texts.a: workload: give exactly one"),
        (
            {"record": {"texts": {"a": {"workload.prompts": "none.jsonl"}}}},
            r"nothing at none.jsonl",
        ),
        ({"set": {"drafter.path": "nowhere"}}, r"nowhere"),
    ],
)
def test_bad_sweeps_are_named(tmp_path: Path, sections: dict, says: str) -> None:
    """Before anything is run, the key and the point that it concerns; exit code 2, no folder."""
    path = file(tmp_path, **sections)
    with pytest.raises(CoschedError, match=says):
        load_plan(path)
    code, _, err = run_cli("sweep", "-c", path)
    assert (code, "Traceback" in err) == (2, False), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=REAL_MODEL if path.stem == "sweep_real" else (), id=path.stem)
        for path in SWEEPS
    ],
)
def test_shipped_sweeps_are_valid(path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(path)
    assert plan.folder == Path("runs") / path.stem
    assert len(plan.recordings) == (3 if path.stem in {"sweep_when", "sweep_real"} else 2)
    assert len(plan.cells) == len(plan.recordings) * len(
        {named(cell.settings) for cell in plan.cells}
    )


@pytest.mark.slow
def test_an_override_in_the_place_of_a_grid_axis_narrows_the_sweep(monkeypatch) -> None:
    """One drafter asked alone has the cells and recordings that it has among all three."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / "sweep_drafters.yaml"
    everything = load_plan(path)
    assert {cell.drafter for cell in everything.cells} == {"eagle3", "dflash", "pard"}
    for kind in ("eagle3", "dflash", "pard"):
        alone = load_plan(path, [f"drafter.kind={kind}"])
        assert alone.recordings.keys() == everything.recordings.keys()
        assert [job.id for job in alone.recordings.values()] == [
            job.id for job in everything.recordings.values()
        ]
        assert [cell.job.id for cell in alone.cells] == [
            cell.job.id for cell in everything.cells if cell.drafter == kind
        ]
