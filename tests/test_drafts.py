"""Several drafts in one run: ``drafts``, each with arms of its own by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cosched.build.served_arm import ServedWorld, build_served_arm
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.errors import ConfigError, CoschedError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.report.html import write_report
from cosched.report.svg import arm_colour_name
from cosched.report.table import arm_cells, load_summary, speed_ratio, times
from cosched.runs.experiment import Experiment
from cosched.settings.arms import adapts, beside, control_of, draft_of, split_arm
from cosched.settings.load import check_paths, load_config, resolved, to_yaml
from cosched.settings.schema import Config
from cosched.sweep.plan import load_plan
from cosched.telemetry.run_folder import NoEvents, RunFolder
from schedulers import defaults
from tests.helpers.paths import TINYWORLD

EAGLE3 = {"kind": "eagle3", "path": str(TINYWORLD / "eagle3"), "num_draft_tokens": 3, "window": 48}
PARD = {"kind": "pard", "path": str(TINYWORLD / "pard"), "num_draft_tokens": 5}
ADAPT = {
    "policy": {"kind": "every_n_rounds", "rounds": 4},
    "replay": {"window": 32, "anchors": 16},
    "guard": {"kind": "finite"},
}


def file(tmp_path: Path, arms: list[str], **sections: object) -> Path:
    """A short experiment over the tiny world; a section of None is left out."""
    raw = {
        "run": {"name": "one", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1},
        "target": {"path": str(TINYWORLD / "target")},
        "drafter": EAGLE3,
        "drafts": {"pard": PARD},
        "workload": {
            "prompts": str(TINYWORLD / "prompts" / "translated.jsonl"),
            "max_new_tokens": 24,
            "max_prompts": 2,
        },
        "arms": arms,
        "adapt": ADAPT,
        **sections,
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({key: one for key, one in raw.items() if one is not None}))
    return path


# --- settings ------------------------------------------------------------------------------


def test_an_arm_has_the_draft_that_it_names(tmp_path: Path) -> None:
    """Whole: nothing of ``drafter`` is taken over; how it learns is as ``adapt`` and it itself say."""
    drafts = {"pard": {**PARD, "adapt": {"trainer": {"lr": 0.01}}}}
    variants = {"fast": {"policy": {"rounds": 2}}}
    path = file(
        tmp_path, ["adapted", "pard.adapted", "pard.fast"], drafts=drafts, variants=variants
    )
    config = load_config(path)
    own, fast, main = map(config.for_arm, ("pard.adapted", "pard.fast", "adapted"))
    assert (own.drafter_settings.kind, own.drafter_settings.num_draft_tokens) == ("pard", 5)
    assert (own.drafter_settings.window, main.drafter_settings.window) == (None, 48)
    assert (own.adapt.trainer.lr, main.adapt.trainer.lr) == (0.01, 3e-4)
    assert (fast.adapt.trainer.lr, fast.policy_settings.rounds) == (0.01, 2)
    assert (own.drafter_key, own.adapt_key) == ("drafts.pard", "drafts.pard.adapt")
    assert (fast.adapt_key, main.adapt_key) == ("drafts.pard.variants.fast", "adapt")
    changed = load_config(path, ["adapt.policy.rounds=9", "drafts.pard.adapt.trainer.lr=0.5"])
    assert changed.for_arm("pard.adapted").policy_settings.rounds == 9
    assert changed.for_arm("pard.adapted").adapt.trainer.lr == 0.5


def test_defaults_are_those_of_the_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the file leaves out, every draft has what its type has, not what ``drafter`` has."""
    parallel = {**defaults.TABLE["parallel"], "trainer": {"lr": 7e-4}, "replay": {"anchors": 9}}
    parallel["loss"] = {"kind": "reverse_kl"}
    monkeypatch.setitem(defaults.TABLE, "parallel", parallel)
    config = load_config(file(tmp_path, ["adapted", "pard.adapted"], adapt=None))
    main, own = config.for_arm("adapted"), config.for_arm("pard.adapted")
    assert (main.loss_settings.kind, main.adapt.trainer.lr) == ("forward_kl", 3e-4)
    assert (own.loss_settings.kind, own.adapt.trainer.lr) == ("reverse_kl", 7e-4)
    assert (main.adapt.replay.anchors, own.adapt.replay.anchors) == (32, 9)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_yaml(load_config(tmp_path / "config.yaml")) == to_yaml(config)


def test_a_file_may_have_named_drafts_only(tmp_path: Path) -> None:
    """Then no arm means an unnamed one; and a draft that no arm uses need not be there."""
    drafts = {"gone": {**PARD, "path": "nowhere"}, "pard": PARD}
    path = file(tmp_path, ["plain", "pard.frozen"], drafter=None, drafts=drafts)
    config = load_config(path)
    check_paths(config)
    footprint(config, *sketch(config))
    assert "drafter" not in resolved(config)
    with pytest.raises(
        ConfigError, match=r"'adapted' names no draft.*gone\.adapted, pard\.adapted"
    ):
        load_config(path, ["arms=[plain,adapted]"])
    with pytest.raises(ConfigError, match=r"drafts\.gone\.path: nothing at nowhere"):
        check_paths(load_config(path, ["arms=[gone.frozen]"]))
    with pytest.raises(ConfigError, match=r"drafter: required.*drafts"):
        load_config(file(tmp_path, ["plain"], drafter=None, drafts=None))


def test_without_drafts_nothing_is_said_of_them(tmp_path: Path) -> None:
    """``config.yaml``, and a sweep's digest of it, are as before there were any."""
    config = load_config(file(tmp_path, ["frozen"], drafts=None))
    assert list(resolved(config)) == [
        *("run", "target", "drafter", "workload", "arms", "engine", "adapt", "record", "variants")
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["arms=[dflash.frozen]"], r"arms: unknown arm 'dflash\.frozen'; there are .*pard\.frozen"),
        (["arms=[pard.plain]"], r"arms: unknown arm 'pard\.plain'"),
        (["arms=[pard.slow]"], r"arms: unknown arm 'pard\.slow'"),
        (["arms=[pard.frozen+window]"], r"'pard\.frozen\+window' needs drafts\.pard\.window"),
        (["drafts.pard.kind=pork"], r"drafts\.pard\.kind: unknown drafter 'pork'"),
        (["drafts.pard.stride=3"], r"drafts\.pard: .*`stride`; allowed here: kind, .*adapt, var"),
        (["drafts.pard.adapt=3"], r"drafts\.pard\.adapt: expected a part of .*adapt, got 3"),
        (["drafts.pard.adapt.trainer.lr=-3"], r"drafts\.pard\.adapt\.trainer\.lr: .*got -3"),
        (["drafts.pard.variants=[1]"], r"drafts\.pard\.variants: expected .*got \[1\]"),
        (["drafts.pard.variants.plain={}"], r"drafts\.pard\.variants: 'plain' cannot name"),
        (["drafts.adapted.kind=pard"], r"drafts: 'adapted' cannot name a draft.*NAME\.frozen"),
        (["drafts.a+b.kind=pard"], r"drafts: 'a\+b' cannot name a draft"),
        (["drafts.pard=4"], r"drafts\.pard: expected a section like drafter, got 4"),
        (["drafts=4"], r"drafts: expected .*NAME.*got 4"),
        (
            ["drafts.pard.num_draft_tokens=31"],
            r"drafts\.pard\.adapt\.replay\.window: 32 .*drafts\.pard\.num_draft_tokens = 31",
        ),
    ],
)
def test_bad_drafts_are_named(tmp_path: Path, changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(file(tmp_path, ["plain", "pard.adapted"]), changes)


def test_what_does_not_fit_a_draft_is_named_by_its_key(tmp_path: Path) -> None:
    """A plugin knows its settings as ``drafter``, which is another section of this file."""
    drafts = {"deep": {"kind": "dflash", "path": str(TINYWORLD / "dflash"), "num_draft_tokens": 4}}
    config = load_config(file(tmp_path, ["frozen", "deep.frozen"], drafts=drafts))
    with pytest.raises(ConfigError, match=r"^drafts\.deep\.num_draft_tokens: 4 is too many"):
        footprint(config, *sketch(config))


def test_a_change_of_kind_leaves_the_old_kinds_fields_behind(tmp_path: Path) -> None:
    drafts = {"other": {**EAGLE3, "norm_output": True}}
    path = file(tmp_path, ["other.frozen"], drafts=drafts)
    changed = load_config(path, ["drafts.other.kind=pard", f"drafts.other.path={PARD['path']}"])
    assert changed.for_arm("other.frozen").drafter_settings.kind == "pard"


def test_memory_is_that_of_the_arm_that_takes_most(tmp_path: Path) -> None:
    """With its own draft, whichever that is."""

    def added(arms: list[str]) -> int:
        config = load_config(file(tmp_path, arms))
        return footprint(config, *sketch(config)).added

    assert added(["adapted", "pard.adapted"]) == max(added(["adapted"]), added(["pard.adapted"]))
    assert added(["adapted"]) != added(["pard.adapted"])


def test_who_takes_one_draft_says_so(tmp_path: Path) -> None:
    """A server, and a sweep, which would judge the wrong one."""
    path = file(tmp_path, ["adapted", "pard.adapted"])
    with pytest.raises(CoschedError, match=r"drafts: a server has one draft.*got pard; .*drafter"):
        check_servable(load_config(path))
    plan = {"base": path.name, "record": {"texts": {"a": {}}}, "around": {"adapt.trainer.lr": [1]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(
        ConfigError, match=r"drafts: a sweep judges one draft.*got pard; use drafter"
    ):
        load_plan(tmp_path / "sweep.yaml")


def test_sglang_is_told_the_own_draft(tmp_path: Path) -> None:
    """The engine's own file, read in another process, has it as ``drafter``, and no other."""
    drafts = {"pard": {**PARD, "window": 24, "adapt": {"trainer": {"lr": 0.25}}}}
    arms = ["frozen", "pard.adapted+window"]
    config = load_config(file(tmp_path, arms, drafts=drafts, engine={"kind": "sglang"}))
    world = ServedWorld(config, None, [], SamplingParams(0.0, 1.0))
    arm = build_served_arm(world, arms[1], NoEvents(), lambda _n: None)
    (tmp_path / "told.yaml").write_text(to_yaml(arm.engine.config))
    read = load_config(tmp_path / "told.yaml")
    assert (read.drafter_settings.kind, read.drafter_settings.window) == ("pard", 24)
    assert (read.adapt.trainer.lr, read.drafts) == (0.25, {})


def test_names() -> None:
    """An arm learns, is held against the frozen arm of its draft, and looks as with any other draft."""
    named = "pard.adapted+window"
    assert (split_arm(named), draft_of(named), adapts(named)) == (("adapted", True), "pard", True)
    assert (draft_of("adapted"), beside(named, "frozen")) == (None, "pard.frozen")
    assert control_of(named) == "pard.frozen+window"
    assert control_of("pard.fast") == "pard.frozen"
    arms = ["plain", *(f"{d}.{a}" for d in ("one", "two", "three") for a in ("frozen", "adapted"))]
    assert [arm_colour_name(arm, arms) for arm in arms] == ["plain", *["frozen", "adapted"] * 3]


# --- runs ----------------------------------------------------------------------------------


def run(config: Config) -> tuple[Path, dict]:
    folder = RunFolder(config.run_folder)
    folder.create()
    Experiment(config).run(folder)
    return folder.path, json.loads((folder.path / "summary.json").read_text())


FIGURES = ("tokens", "rounds", "tau", "tau_novel", "position_acceptance", "updates", "losses")


@pytest.mark.slow
@pytest.mark.long
def test_each_draft_does_what_it_does_alone(tmp_path: Path) -> None:
    """Tokens, rounds, acceptance and losses to the last digit; one report has both."""
    arms = ["plain", "frozen", "adapted", "pard.frozen", "pard.adapted"]
    short = "workload.max_new_tokens=16"
    folder, together = run(load_config(file(tmp_path, arms), [short]))
    assert list(together["arms"]) == arms
    assert together["run"]["drafts"]["pard"] == {
        "drafter": "pard",
        "num_draft_tokens": 5,
        "length": "fixed",
        "window": None,
    }
    for name, drafter in (("", EAGLE3), ("pard.", PARD)):
        path = file(tmp_path, ["adapted"], drafter=drafter, drafts=None)
        _, alone = run(load_config(path, [short, f"run.name={drafter['kind']}"]))
        for arm, figures in alone["arms"].items():
            found = together["arms"][name + arm]
            assert {key: found[key] for key in FIGURES} == {key: figures[key] for key in FIGURES}
            assert found["lossless_mismatches"] == 0
        assert together["arms"][f"{name}adapted"]["updates"] > 0
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"adapted", "pard.adapted"}
    saved, loaded = (
        json.loads((place / "config.json").read_text())
        for place in (folder / "checkpoints" / "pard.adapted", TINYWORLD / "pard")
    )
    assert saved.items() >= loaded.items()
    page = write_report(folder).read_text()
    for arm, control in (("adapted", "frozen"), ("pard.adapted", "pard.frozen")):
        assert f"{arm} committed" in page
        assert f"the speed of {control}" in page
    assert "tokens drafted per round: eagle3 3, pard 5" in page
    summary = load_summary(folder)
    own = times(speed_ratio(summary.arms, "pard.adapted", "pard.frozen"))
    assert arm_cells(summary, "pard.adapted")[7] == own


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_goes_on_with_every_draft(tmp_path: Path) -> None:
    """As if it had run in one go: each arm takes its own draft's weights and counters up again."""
    path = file(tmp_path, ["adapted", "pard.adapted"])
    _, whole = run(load_config(path, ["run.name=whole"]))
    config, committed = load_config(path), 0
    folder = RunFolder(config.run_folder)
    folder.create()

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 2 * 24 + 12:  # in the middle of the second request
            raise KeyboardInterrupt

    assert Experiment(config).run(folder, interrupt).run["interrupted"]
    resumed = Experiment(config).run(folder, resume=True)
    for name, arm in whole["arms"].items():
        assert resumed.arms[name].losses == arm["losses"]
        assert resumed.arms[name].tau == arm["tau"]


@pytest.mark.slow
def test_a_trace_has_the_features_of_every_draft(tmp_path: Path) -> None:
    """Recorded by the plain arm, and replayed by the arms of each."""
    dflash = {"kind": "dflash", "path": str(TINYWORLD / "dflash"), "num_draft_tokens": 3}
    drafts = {"dflash": dflash, "eagle3": EAGLE3}
    arms = ["plain", "dflash.frozen", "eagle3.frozen"]
    short = "workload.max_new_tokens=12"
    config = load_config(file(tmp_path, arms, drafter=None, drafts=drafts), [short])
    folder = RunFolder(config.run_folder)
    folder.create()
    live = Experiment(config, record=True).run(folder)
    trace = [
        short,
        "run.name=again",
        "engine.kind=trace",
        f"engine.trace={folder.path / 'trace'}",
        "arms=[dflash.frozen,eagle3.frozen]",
    ]
    _, replayed = run(load_config(tmp_path / "experiment.yaml", trace))
    for name, arm in replayed["arms"].items():
        assert arm["tau"] == live.arms[name].tau
