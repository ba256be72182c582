"""Published ways to adapt, as arms of ``configs/recipes.yaml``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.guard.settings import ShadowSettings
from cosched.registry import defaults_for
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import RunFolder
from cosched.workload.requests import load_requests
from schedulers.earned import EarnedSettings
from tests.helpers.cli import run_cli
from tests.helpers.paths import ROOT

RECIPES = ROOT / "configs" / "recipes.yaml"


def recipes(*overrides: str) -> Config:
    return load_config(RECIPES, overrides)


def test_the_file_is_valid() -> None:
    """``cosched check`` accepts it, and every recipe has an arm."""
    code, out, err = run_cli("check", "-c", RECIPES)
    assert (code, "valid" in out) == (0, True), err
    config = recipes()
    assert set(config.variants) <= set(config.arms)
    assert {"frozen", "frozen+window", "ours", "tts", "osd", "aurora"} <= set(config.arms)


def test_ours_is_what_a_file_gets_that_says_nothing() -> None:
    config, defaults = recipes().for_arm("ours"), defaults_for("eagle3")
    adapt = config.adapt
    assert config.policy_settings == EarnedSettings(**defaults["policy"])
    assert adapt.loss == defaults["loss"]
    assert adapt.trainer.lr == defaults["trainer"]["lr"]
    assert adapt.replay.anchors == defaults["replay"]["anchors"]
    own = {key: value for key, value in defaults["guard"].items() if key != "kind"}
    assert adapt.guard == ShadowSettings(**own)


def test_recipes_say_what_their_sources_say() -> None:
    """The settings by which they differ, as the pages on them report."""
    config = recipes()
    tts, osd, aurora = (config.for_arm(name) for name in ("tts", "osd", "aurora"))
    assert (tts.adapt.scope.state, tts.adapt.scope.kind) == ("per_request", "full")
    assert (tts.policy_settings.num_steps, tts.adapt.replay.anchors) == (1, 1)
    assert (tts.loss_settings.rows, tts.loss_settings.refused_weight) == ("all", 1)
    assert (osd.policy_settings.requests, osd.loss_settings.rows) == (8, "refused")
    assert (aurora.loss_settings.kind, aurora.loss_settings.rows) == ("reverse_kl", "all")
    for config in (osd, aurora):  # every request teaches in exactly one update
        assert config.adapt.scope.state == "shared"
        assert config.adapt.replay.keep_finished
        assert config.adapt.replay.fresh


def test_prompts_are_answered_more_than_once(tiny_target: Target) -> None:
    """One round over all prompts after the other, each answer under an id of its own."""
    workload = recipes("workload.samples=3", "workload.max_prompts=2").workload
    requests = load_requests(workload, tiny_target.tokenizer, 4096, tiny_target.device)
    first = [request.id for request in requests[:2]]
    assert [r.id for r in requests] == first + [f"{i}#{n}" for n in (2, 3) for i in first]
    assert requests[0].prompt_P.equal(requests[2].prompt_P)
    with pytest.raises(ConfigError, match=r"workload\.samples: .*got 4"):
        recipes(
            "workload.prompts=null",
            "workload.documents=tinyworld/documents/code.jsonl",
            "variants.tts.loss.rows=accepted",
            "variants.tts-stride.loss.rows=accepted",
            "variants.aurora.loss.rows=accepted",
        )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_every_recipe_learns(tmp_path: Path, kind: str) -> None:
    """A few tokens, cadences to match: each arm has updates, when and on what its recipe says."""
    arms = ["frozen", "ours", "tts", "tts-stride", "osd", "aurora"]
    config = recipes(
        f"drafter.kind={kind}",
        f"run.dir={tmp_path}",
        f"arms=[{','.join(arms)}]",
        "workload.max_prompts=2",
        "workload.samples=2",
        "workload.max_new_tokens=24",
        "variants.osd.policy.requests=2",
        "variants.aurora.policy.requests=2",
    )
    folder = RunFolder(config.run_folder)
    folder.create()
    found = Experiment(config).run(folder).arms
    assert found["osd"].updates == found["aurora"].updates == 2
    assert found["tts"].versions > found["tts"].updates > 0  # and resets
    assert found["tts-stride"].updates > 0
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    rows = {
        arm: [e["result"]["num_rows"] for e in events if (e["kind"], e["arm"]) == ("update", arm)]
        for arm in arms
    }
    drafted = config.drafter_settings.num_draft_tokens
    assert set(rows["tts"]) == {drafted}  # the latest round
    assert max(rows["tts-stride"]) == 10 * drafted  # all rounds of the stride
    assert min(rows["osd"]) > 10 * drafted  # two requests
