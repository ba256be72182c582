"""``adapt.placement: sidecar``: which addresses need a key, and what does not go with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosched.build.served_arm import build_served_arm
from cosched.engines.embedded.verification import SamplingParams
from cosched.errors import ConfigError
from cosched.report.remarks import trainer_lines
from cosched.runs.summary import _about_trainer
from tests.helpers.guarded_runs import Events
from tests.helpers.sidecar import configured

KEYLESS = "adapt.sidecar.address=tcp://10.0.0.7:29600"


@pytest.mark.parametrize(
    "address",
    ["ipc:///tmp/some/socket", "tcp://127.0.0.1:29600", "tcp://localhost:1", "tcp://[::1]:29600"],
)
def test_on_this_machine_nobody_needs_a_key(tmp_path: Path, address: str) -> None:
    """Sockets of files and the loopback are for who is here already."""
    config = configured(tmp_path, f"adapt.sidecar.address={address}")
    assert config.adapt.sidecar.address == address


@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.7:29600", "tcp://*:29600", "tcp://trainer.example:29600"]
)
def test_where_others_can_speak_a_key_is_required(tmp_path: Path, address: str) -> None:
    """Anybody could send rows to learn from; with a key the same address is accepted."""
    words = f"adapt.sidecar.address={address}"
    with pytest.raises(ConfigError, match=r"adapt\.sidecar\.key_file: required"):
        configured(tmp_path, words)
    assert configured(tmp_path, words, "adapt.sidecar.key_file=some/key")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["adapt.sidecar.address=null"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.address=udp://127.0.0.1:1"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.address=ipc://relative"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.device=tpu"], r"adapt\.sidecar\.device"),
        (["adapt.sidecar.queue_rounds=1"], r"adapt\.sidecar\.queue_rounds"),
        (["adapt.placement=elsewhere"], r"adapt\.placement"),
        (["adapt.scope.state=per_request"], r"adapt\.scope\.state"),
        (
            ["arms=[plain, adapted, adapted+window]", "drafter.window=32"],
            r"arms: adapted, adapted\+window",
        ),
        (["adapt.trainer.background=true"], r"adapt\.trainer\.background"),
        (["adapt.trainer.limit_seconds=5"], r"adapt\.trainer\.limit_seconds"),
        (["adapt.trainer.restarts=0"], r"adapt\.trainer\.restarts"),
        (["engine.kind=trace", "engine.trace=t", "engine.exact=false"], r"adapt\.placement"),
    ],
)
def test_what_does_not_go_with_a_sidecar_is_named(
    tmp_path: Path, words: list[str], key: str
) -> None:
    """Each by its own key, when the file is read."""
    with pytest.raises(ConfigError, match=key):
        configured(tmp_path, *words)


def test_a_colocated_draft_needs_no_address(tmp_path: Path) -> None:
    """The section is there for who wants it."""
    words = "adapt.placement=colocated", "adapt.sidecar.address=null"
    assert configured(tmp_path, *words).adapt.placement == "colocated"


def test_one_arm_may_learn_in_a_sidecar_beside_one_that_does_not(tmp_path: Path) -> None:
    """That compares the two."""
    words = "arms=[plain, adapted, here]", "variants.here={placement: colocated}"
    assert configured(tmp_path, *words).variants["here"].placement == "colocated"


def test_an_arm_in_sglang_that_no_trainer_would_take_is_refused(tmp_path: Path) -> None:
    """A trainer of servers in SGLang always learns with the window, so it refused this one in the end."""
    words = "engine.kind=sglang", "engine.exact=false", "drafter.window=32"
    world: Any = SimpleNamespace(config=configured(tmp_path, *words), sampling=SamplingParams(0, 1))
    with pytest.raises(ConfigError, match=r"drafter\.window: .*adapted\+window"):
        build_served_arm(world, "adapted", Events(), lambda _number: None)
    assert build_served_arm(world, "adapted+window", Events(), lambda _number: None)


@pytest.mark.parametrize(
    ("version", "trouble", "words"),
    [
        (0, None, "served the draft as loaded from its first round to its last: no version came."),
        (0, "refused", "no version came (refused)."),
        (4, "nobody is there", "served without its trainer in the end: nobody is there."),
        (4, None, None),
    ],
)
def test_a_run_says_whether_its_arm_had_a_trainer(
    tmp_path: Path, version: int, trouble: str | None, words: str | None
) -> None:
    """Without one it gave the results of a frozen draft under the name "adapted", without a word."""
    learner = SimpleNamespace(version=version, trouble=trouble)
    arms = [("plain", None), ("adapted", learner)]
    running: Any = [SimpleNamespace(arm=SimpleNamespace(name=n, coscheduler=c)) for n, c in arms]
    about = _about_trainer(configured(tmp_path), running)
    summary: Any = SimpleNamespace(run=about, arms={"adapted": SimpleNamespace(versions=version)})
    lines = trainer_lines(summary)
    assert [line.startswith("adapted ") for line in lines] == ([True] if words else [])
    assert not words or lines[0].endswith(words)
