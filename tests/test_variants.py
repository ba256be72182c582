"""Several ways to adapt in one run: variants of ``adapt``, each an arm by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cosched.build.embedded import build_arm, build_world
from cosched.build.served_arm import ServedWorld, build_served_arm
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.errors import ConfigError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.report.html import write_report
from cosched.report.svg import arm_colour_name
from cosched.runs.experiment import Experiment
from cosched.settings.arms import adapts, control_of
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import NoEvents, RunFolder
from tests.helpers.paths import ROOT

ADAPT = {
    "policy": {"kind": "every_n_rounds", "rounds": 4, "num_steps": 2},
    "loss": {"kind": "forward_kl", "position_decay": 0.7},
    "replay": {"window": 32, "anchors": 16},
    "trainer": {"lr": 1e-3},
    "guard": {"kind": "finite"},
}


def file(tmp_path: Path, variants: object, arms: list[str], **sections: dict) -> Path:
    """A short experiment over the tiny world with these variants."""
    world = ROOT / "tinyworld"
    raw = {
        "run": {"name": "one", "dir": str(tmp_path / "runs")},
        "target": {"path": str(world / "target")},
        "drafter": {"kind": "eagle3", "path": str(world / "eagle3"), "window": 48},
        "workload": {
            "prompts": str(world / "prompts" / "translated.jsonl"),
            "max_new_tokens": 40,
            "max_prompts": 2,
        },
        "arms": arms,
        "adapt": ADAPT,
        "variants": variants,
        **sections,
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_variant_is_adapt_with_changes(tmp_path: Path) -> None:
    """What it does not say is as in ``adapt``; another kind has none of the old kind's fields."""
    variants = {
        "fast": {"trainer": {"lr": 0.01}},
        "by-tokens": {
            "policy": {"kind": "every_n_tokens", "tokens": 9},
            "scope": {"state": "per_request"},
        },
    }
    config = load_config(file(tmp_path, variants, ["frozen", "fast", "by-tokens+window"]))
    fast, by_tokens = config.for_arm("fast"), config.for_arm("by-tokens+window")
    assert fast.adapt.trainer.lr == 0.01
    assert (fast.policy_settings.rounds, fast.loss_settings.position_decay) == (4, 0.7)
    assert (by_tokens.policy_settings.tokens, by_tokens.policy_settings.num_steps) == (9, 2)
    assert by_tokens.adapt.scope.state == "per_request"
    assert config.for_arm("adapted").adapt == config.for_arm("frozen").adapt == config.adapt


def test_overrides_reach_variants(tmp_path: Path) -> None:
    """By their own name, with a change of kind as in ``adapt``; and through ``adapt`` itself."""
    path = file(tmp_path, {"a": {"policy": {"rounds": 5}}, "b": {}}, ["a", "b"])
    changed = load_config(path, ["variants.a.policy.kind=drift", "adapt.trainer.lr=0.5"])
    assert changed.for_arm("a").policy_settings.kind == "drift"
    assert changed.for_arm("b").policy_settings.kind == "every_n_rounds"
    assert changed.for_arm("a").adapt.trainer.lr == changed.for_arm("b").adapt.trainer.lr == 0.5


def test_the_resolved_file_is_the_same_experiment(tmp_path: Path) -> None:
    """``config.yaml`` has every variant whole, and loads to the same settings."""
    variants = {"a": {"policy": {"kind": "every_n_tokens"}}, "b": {"loss": {"kind": "reverse_kl"}}}
    config = load_config(file(tmp_path, variants, ["a", "b+window"]))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert to_yaml(again) == to_yaml(config)
    assert again.for_arm("b").loss_settings.kind == "reverse_kl"
    assert again.for_arm("a").adapt.trainer == config.adapt.trainer


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ({"a": {"trainer": {"lr": -1}}}, r"variants\.a\.trainer\.lr: .*got -1"),
        ({"a": {"trainer": {"rate": 1}}}, r"variants\.a\.trainer: .*rate.*allowed here: .*lr"),
        ({"a": {"polcy": {}}}, r"variants\.a: .*polcy.*allowed here: .*policy"),
        ({"a": {"policy": {"kind": "someday"}}}, r"variants\.a\.policy\.kind: .*someday.*never"),
        ({"a": {"policy": {"kind": ["never"]}}}, r"variants\.a\.policy\.kind: .*got \['never'\]"),
        (
            {"a": {"policy": {"tokens": 3}}},
            r"variants\.a\.policy: .*tokens.*allowed here: .*rounds",
        ),
        ({"a": {"loss": {"position_decay": 0}}}, r"variants\.a\.loss\.position_decay: "),
        ({"a": {"replay": {"window": 3}}}, r"variants\.a\.replay\.window: 3 holds no path"),
        ({"a": 3}, r"variants\.a: expected a part of the section adapt, got 3"),
        ([1], r"variants: expected .*NAME.*got \[1\]"),
        ({"frozen": {}}, r"variants: 'frozen' cannot name an arm"),
        ({"a+window": {}}, r"variants: 'a\+window' cannot name an arm"),
        ({"../a": {}}, r"variants: '\.\./a' cannot name an arm"),
        ({"b": {}}, r"arms: unknown arm 'a'; there are plain, frozen, adapted, b"),
    ],
)
def test_bad_variants_are_named(tmp_path: Path, variants: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(file(tmp_path, variants, ["frozen", "a"]))


def test_each_variant_fits_engine_and_text(tmp_path: Path) -> None:
    """What does not go together is named with the variant's key, and only where an arm uses it."""
    alone, drafted = {"scope": {"state": "per_request"}}, {"loss": {"rows": "all"}}
    pair = {"engine": {"max_batch": 2}}
    path = file(tmp_path, {"alone": alone, "other": {}}, ["frozen", "alone"], **pair)
    with pytest.raises(ConfigError, match=r"variants\.alone\.scope\.state: .*max_batch.*got 2"):
        load_config(path)
    load_config(path, ["arms=[frozen,other]"])
    path = file(tmp_path, {"drafted": drafted}, ["drafted"])
    trace = ["engine.kind=trace", "engine.trace=somewhere"]
    with pytest.raises(ConfigError, match=r"variants\.drafted\.loss\.rows: 'all' needs rows after"):
        load_config(path, trace)
    load_config(path, [*trace, "arms=[adapted]"])
    path = file(tmp_path, {"small": {"memory": {"max_bytes": 1000}}}, ["adapted", "small"])
    config = load_config(path)
    with pytest.raises(ConfigError, match=r"variants\.small\.memory\.max_bytes: 1000 holds no"):
        footprint(config, *sketch(config))


@pytest.mark.parametrize(
    ("partial", "says"),
    [
        ({"scope": {"kind": "toes"}}, r"variants\.a\.scope\.kind: 'toes' is no scope"),
        (
            {"scope": {"kind": "lora", "targets": ["toe"]}},
            r"variants\.a\.scope\.targets: 'toe' names no linear layer",
        ),
        (
            {"loss": {"kind": "top_k_cross_entropy", "k": 5000}},
            r"variants\.a\.loss: k = 5000 .*use at most 2048",
        ),
    ],
)
def test_what_does_not_fit_the_draft_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: dict, says: str
) -> None:
    monkeypatch.setattr(Target, "load", None)
    with pytest.raises(ConfigError, match=says):
        build_world(load_config(file(tmp_path, {"a": partial}, ["a"])))


def test_memory_is_that_of_the_arm_that_takes_most(tmp_path: Path) -> None:
    """A variant with a wider buffer counts as if it were ``adapted``; a frozen arm hides nothing."""

    def added(variants: dict, arms: list[str]) -> int:
        config = load_config(file(tmp_path, variants, arms))
        return footprint(config, *sketch(config)).added

    wide = {"wide": {"replay": {"window": 320}}}
    assert added(wide, ["wide"]) > added(wide, ["adapted"]) > added(wide, ["frozen"])
    assert added(wide, ["frozen", "adapted", "wide"]) == added(wide, ["wide"])


def run(config: Config) -> tuple[Path, dict]:
    folder = RunFolder(config.run_folder)
    folder.create()
    Experiment(config).run(folder)
    return folder.path, json.loads((folder.path / "summary.json").read_text())["arms"]


def losses(arm: dict) -> list[float]:
    return arm["losses"]


@pytest.mark.slow
@pytest.mark.long
def test_a_variant_runs_like_adapted(tmp_path: Path) -> None:
    """An empty variant repeats ``adapted`` to the bit, another goes its own way; all is kept."""
    variants = {"same": {}, "own": {"policy": {"rounds": 8}, "scope": {"state": "per_request"}}}
    arms = ["frozen", "frozen+window", "adapted", "same", "own", "own+window"]
    folder, found = run(load_config(file(tmp_path, variants, arms)))
    assert list(found) == arms
    assert losses(found["same"]) == losses(found["adapted"])
    assert 0 < found["own"]["updates"] < found["adapted"]["updates"]
    assert found["own"]["versions"] > found["own"]["updates"]  # and a reset between two requests
    assert all(arm["lossless_mismatches"] == 0 for arm in found.values())
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"adapted", "same"}
    page = write_report(folder).read_text()
    assert "own+window" in page
    assert "same committed" in page


def test_only_its_own_section_builds_an_arm(tmp_path: Path) -> None:
    """Two arms of one world differ by what their sections say, down to the optimizer."""
    config = load_config(file(tmp_path, {"fast": {"trainer": {"lr": 0.25}}}, ["adapted", "fast"]))
    world = build_world(config)
    rates = []
    for name in config.arms:
        coscheduler = build_arm(world, name, NoEvents()).coscheduler
        assert coscheduler is not None
        rates.append(coscheduler.trainer.learning_rate)
    assert rates == [1e-3, 0.25]


def test_sglang_is_told_the_variant(tmp_path: Path) -> None:
    """The engine's own file, read in another process, has the variant as its ``adapt``."""
    variants = {"fast": {"trainer": {"lr": 0.25}, "policy": {"kind": "every_n_tokens"}}}
    config = load_config(
        file(tmp_path, variants, ["frozen", "fast", "fast+window"], engine={"kind": "sglang"})
    )
    world = ServedWorld(config, None, [], SamplingParams(0.0, 1.0))
    for name, window, policy in (
        ("frozen", None, "never"),
        ("fast", None, "every_n_tokens"),
        ("fast+window", 48, "every_n_tokens"),
    ):
        told = build_served_arm(world, name, NoEvents(), lambda _n: None).engine.config
        (tmp_path / "told.yaml").write_text(to_yaml(told))
        read = load_config(tmp_path / "told.yaml")
        assert read.policy_settings.kind == policy
        assert read.adapt.trainer.lr == (1e-3 if name == "frozen" else 0.25)
        assert read.drafter_settings.window == window


def test_names() -> None:
    """A variant learns, is held against the frozen arm of its window, and has its own colour."""
    arms = ["plain", "frozen", "frozen+window", "adapted", "tts", "osd", "tts+window", "ink"]
    assert [arm for arm in arms if adapts(arm)] == ["adapted", "tts", "osd", "tts+window", "ink"]
    assert control_of("tts+window") == "frozen+window"
    assert control_of("osd") == "frozen"
    colours = {arm: arm_colour_name(arm, arms) for arm in arms}
    assert colours["tts"] == colours["tts+window"] != colours["osd"]
    assert colours["ink"].startswith("spare")  # not the palette's own entry of that name
    assert colours["frozen+window"] == "frozen-window"
