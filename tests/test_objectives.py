"""What updates are made with, as a file says it, and what goes by the drafter where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cosched.errors import ConfigError
from cosched.guard.settings import FiniteSettings, ShadowSettings
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.protocols import LossSettings
from cosched.registry import DRAFTERS, defaults_for
from cosched.settings.load import load_config, to_yaml
from schedulers.defaults import TABLE
from tests.helpers.guarded_runs import SAMPLED
from tests.helpers.objectives import GOOD, experts

# --- settings ------------------------------------------------------------------------------

TWO = "{lr: 1.0e-3}, {loss: {kind: reverse_kl, position_decay: 0.5}}"


def test_an_expert_says_only_what_is_its_own(tmp_path: Path) -> None:
    """The rest is as in ``adapt``; the written configuration has all of it, and is read the same."""
    config = load_config(
        SAMPLED,
        [
            "adapt.guard.kind=shadow",
            f"adapt.objective={{kind: hedge, warm_tokens: 256, experts: [{TWO}]}}",
            "adapt.loss={kind: top_k_cross_entropy, k: 8, position_decay: 0.7}",
        ],
    )
    first, second = config.experts
    assert first == (config.loss_settings, 1e-3)
    assert second == (LossSettings(kind="reverse_kl", position_decay=0.5), 3e-4)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    written = yaml.safe_load(path.read_text())["adapt"]["objective"]
    assert [expert["lr"] for expert in written["experts"]] == [1e-3, 3e-4]
    assert written["experts"][0]["loss"]["k"] == 8
    again = load_config(path)
    assert (again.experts, to_yaml(again)) == (config.experts, to_yaml(config))


def test_a_variant_has_its_own_objective() -> None:
    config = load_config(
        SAMPLED,
        [
            "arms=[frozen,tried]",
            f"variants.tried.objective={{kind: hedge, experts: [{TWO}]}}",
            "variants.tried.guard.kind=shadow",
        ],
    )
    assert config.for_arm("frozen").experts == ()
    assert [rate for _, rate in config.for_arm("tried").experts] == [1e-3, 3e-4]
    with pytest.raises(ConfigError, match=r"variants\.tried\.guard\.kind: .*use shadow"):
        load_config(
            SAMPLED,
            ["arms=[tried]", f"variants.tried.objective={{kind: hedge, experts: [{TWO}]}}"],
        )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapt.objective.kind=bandit"], r"adapt\.objective\.kind: .*'bandit'.*fixed, hedge"),
        (["adapt.objective.warm_tokens=-1"], r"adapt\.objective\.warm_tokens: .*got -1"),
        (
            ["adapt.objective.experts=[]"],
            r"adapt\.objective: .*`experts`.*allowed here: kind, warm",
        ),
        (["adapt.objective.kind=hedge"], r"adapt\.objective: .*`experts`"),
        ([experts()], r"adapt\.objective\.experts: .*length >= 2"),
        ([experts(GOOD)], r"adapt\.objective\.experts: .*length >= 2"),
        ([experts(GOOD, "{rate: 1}")], r"adapt\.objective\.experts\[1\]: .*`rate`; .*: loss, lr"),
        ([experts(GOOD, "{lr: 0}")], r"adapt\.objective\.experts\[1\]\.lr: .*> 0.*got 0"),
        (
            [experts(GOOD, "{loss: {kind: hope}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.kind: .*'hope'; there are: .*forward_kl",
        ),
        (
            [experts(GOOD, "{loss: {position_decay: 2}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.position_decay: .*got 2",
        ),
        (
            [experts(GOOD, "{loss: {kind: proximal_kl}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.kind: 'proximal_kl' does not look",
        ),
        (
            [experts(GOOD, "{loss: {rows: accepted}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.rows: .*'accepted'; use 'delayed'",
        ),
        ([experts(GOOD, GOOD, eta=0)], r"adapt\.objective\.eta: .*got 0"),
        ([experts(GOOD, GOOD, discount=1.1)], r"adapt\.objective\.discount: .*got 1\.1"),
        (
            [experts(GOOD, GOOD), "adapt.guard.kind=finite"],
            r"adapt\.guard\.kind: adapt\.objective\.kind = hedge .*got finite; use shadow",
        ),
        (
            [experts(GOOD, GOOD), "adapt.trainer.background=true"],
            r"adapt\.trainer\.background: adapt\.objective\.kind = hedge .*use false",
        ),
        (
            [
                experts(GOOD, GOOD),
                "adapt.scope={kind: lora, state: per_request}",
                "engine.max_batch=2",
            ],
            r"adapt\.scope\.state: adapt\.objective\.kind = hedge .*per_request; use shared",
        ),
    ],
)
def test_bad_objectives_are_named(overrides: list[str], says: str) -> None:
    """The message names the key, what came and what is allowed."""
    with pytest.raises(ConfigError, match=says):
        load_config(SAMPLED, ["adapt.guard.kind=shadow", *overrides])


def test_trials_are_in_the_footprint() -> None:
    """Two states of the trainer, weights and moments; and the copy that any of the losses needs."""
    held = "{loss: {kind: sum, terms: [{kind: forward_kl}, {kind: proximal_kl}]}}"
    configs = [
        load_config(SAMPLED, ["adapt.guard.kind=shadow", *more])
        for more in ([], [experts(GOOD, held)])
    ]
    fixed, tried = (footprint(config, *sketch(config)) for config in configs)
    assert (fixed.trials, fixed.reference) == (0, 0)
    assert tried.trials == 2 * 12 * tried.num_trained > 0
    assert tried.reference == 4 * tried.num_trained
    assert tried.added > fixed.added + tried.trials


# --- defaults by how a drafter drafts ------------------------------------------------------


def bare(tmp_path: Path, drafter: str, adapt: str = "{}") -> Path:
    path = tmp_path / "bare.yaml"
    path.write_text(
        f"run: {{name: bare}}\ntarget: {{path: tinyworld/target}}\n"
        f"drafter: {{kind: {drafter}, path: tinyworld/{drafter}}}\n"
        f"workload: {{prompts: tinyworld/prompts/code.jsonl}}\nadapt: {adapt}\n"
    )
    return path


@pytest.mark.parametrize("drafter", ["eagle3", "dflash", "pard"])
def test_what_a_file_leaves_out_goes_by_the_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """The row of its type and no other; written out where the run keeps its settings."""
    row = {
        "policy": {"kind": "every_n_tokens", "tokens": 7},
        "loss": {"kind": "top_k_cross_entropy", "k": 5},
        "trainer": {"lr": 0.125},
        "replay": {"anchors": 9},
        "guard": {"kind": "shadow", "check_rounds": 2},
    }
    for kind in set(TABLE) - {"none"}:
        mine = kind == DRAFTERS.get(drafter).draft_type
        monkeypatch.setitem(TABLE, kind, row if mine else {"trainer": {"lr": 99.0}})
    config = load_config(bare(tmp_path, drafter))
    assert (config.policy_settings.tokens, config.loss_settings.k) == (7, 5)
    assert (config.adapt.trainer.lr, config.adapt.replay.anchors) == (0.125, 9)
    assert yaml.safe_load(to_yaml(config))["adapt"]["policy"]["tokens"] == 7
    said = (
        "{policy: {num_steps: 3}, loss: {kind: reverse_kl}, guard: {anchors: 7}, "
        "trainer: {zero_stage: 0}, replay: {window: 99}}"
    )
    config = load_config(bare(tmp_path, drafter, said), ["adapt.replay.anchors=3"])
    policy, guard = config.policy_settings, config.adapt.guard
    assert (policy.kind, policy.tokens, policy.num_steps) == ("every_n_tokens", 7, 3)
    assert config.loss_settings == LossSettings(kind="reverse_kl")
    assert guard == ShadowSettings(anchors=7, check_rounds=2)
    assert (config.adapt.trainer.lr, config.adapt.trainer.zero_stage) == (0.125, 0)
    assert (config.adapt.replay.anchors, config.adapt.replay.window) == (3, 99)
    changed = ["adapt.policy.kind=every_n_rounds", "adapt.guard.kind=finite"]
    config = load_config(bare(tmp_path, drafter, said), changed)
    policy = config.policy_settings
    assert (policy.kind, policy.rounds, policy.num_steps) == ("every_n_rounds", 16, 3)
    assert config.adapt.guard == FiniteSettings()
    config = load_config(bare(tmp_path, drafter), ["variants.fast.trainer.lr=0.5"])
    fast = config.for_arm("fast")
    assert (fast.adapt.trainer.lr, fast.policy_settings.tokens) == (0.5, 7)


@pytest.mark.parametrize("draft_type", sorted(TABLE))
def test_every_row_of_the_table_is_allowed(tmp_path: Path, draft_type: str) -> None:
    """It loads as it stands, and a caller cannot change it."""
    kinds = {plugin.cls.draft_type: plugin.name for plugin in DRAFTERS.plugins()}
    config = load_config(bare(tmp_path, kinds[draft_type]))
    if draft_type == "none":  # nothing is trained
        assert TABLE[draft_type].keys() == {"guard"}
        return
    assert config.loss_settings.kind == TABLE[draft_type]["loss"]["kind"]
    defaults_for(kinds[draft_type])["trainer"]["lr"] = 1.0
    assert TABLE[draft_type]["trainer"]["lr"] != 1.0


def test_a_drafter_that_does_not_say_how_it_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DRAFTERS.get("eagle3"), "draft_type", "tree")
    with pytest.raises(ConfigError, match=r"drafter\.kind: .*'eagle3'.*'tree'.*chain, block"):
        load_config(bare(tmp_path, "eagle3"))
