"""``drafter.length``: what may be said of it, draft by draft."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosched.errors import ConfigError
from cosched.settings.load import load_config, resolved
from tests.helpers.experiments import write


def test_lengths_are_settings_of_each_draft(tmp_path: Path, settings: dict) -> None:
    """A draft has its own, fixed where it names none; an override of the kind leaves its fields behind."""
    draft = settings["drafter"] | {"length": {"kind": "threshold", "bound": 0.7}}
    settings["drafts"] = {"other": draft}
    path = write(tmp_path, settings)
    config = load_config(path, ["arms=[plain,frozen,other.frozen]"])
    assert config.length_settings.kind == "fixed"
    assert config.for_arm("other.frozen").length_settings.bound == 0.7
    assert resolved(config)["drafter"]["length"] == {"kind": "fixed"}
    assert resolved(config)["drafts"]["other"]["length"]["explore_rounds"] == 64
    config = load_config(path, ["drafts.other.length.kind=goodput", "arms=[other.frozen]"])
    assert config.for_arm("other.frozen").length_settings.explore_share == 0.005


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["drafter.length.kind=longest"], r"drafter\.length\.kind: unknown draft length 'longest'"),
        (["drafter.length.bound=0.3"], r"drafter\.length: .*unknown field `bound`"),
        (
            ["drafter.length.kind=threshold", "drafter.length.bound=2"],
            r"drafter\.length\.bound: .*< 1",
        ),
        (
            ["drafter.length.kind=goodput", "engine.kind=trace", "engine.trace=x"],
            r"drafter\.length\.kind: goodput weighs the seconds",
        ),
        (
            ["drafter.length.kind=threshold", "engine.kind=sglang", "drafter.kind=eagle3"],
            r"drafter\.length\.kind: SGLang drafts as many tokens for every .* goodput or fixed",
        ),
        (
            ["drafter.length.kind=goodput", "engine.kind=sglang", "drafter.kind=dflash"],
            r"drafter\.length\.kind: in SGLang dflash drafts as many .* fixed \(eagle3 can",
        ),
        (
            ["drafter.length={kind: goodput, among: [0, 2, 9]}"],
            r"drafter\.length: it may draft 9 tokens, and drafter\.num_draft_tokens, the most, is",
        ),
    ],
)
def test_bad_lengths_are_named(
    tmp_path: Path, settings: dict, overrides: list[str], says: str
) -> None:
    """What is no length, or not one for this engine, is refused by its key."""
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path, settings), overrides)
