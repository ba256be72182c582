"""The guard: what it looks at, what it holds, and its settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosched.build.embedded import build_arm
from cosched.errors import ConfigError, PublicationError
from cosched.guard.guard import LOOKED_AT, FiniteGuard, ShadowGuard
from cosched.guard.monitor import Monitor
from cosched.guard.settings import ShadowSettings
from cosched.guard.statistics import BLOCK
from cosched.loop.publish import InPlacePublisher
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import UpdateResult, Verdict
from cosched.settings.load import load_config
from cosched.testing.harness import collected, make_requests, make_target, serve
from tests.helpers.drafts import make_drafter
from tests.helpers.guarded_runs import SAMPLED, Events, world_of
from tests.helpers.rounds import round_of, snapshot

# --- versions ------------------------------------------------------------------------------


def test_the_version_that_serves_survives_a_file() -> None:
    """The newest ``keep`` are kept; what serves goes into the state, under its number."""
    target = make_target(seed=3)
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model, keep=2)
    for _ in range(6):
        publisher.publish({"norm.weight": network.norm.weight + 1})
    assert sorted(publisher._kept) == [5, 6]
    state = publisher.state()
    again = InPlacePublisher.of_modules(make_drafter(target).network(), target.model)
    again.restore(state, 6)
    assert again.version == 6
    expected = publisher.weights_of(6)["norm.weight"]
    assert torch.equal(again.weights_of(6)["norm.weight"], expected)
    with pytest.raises(PublicationError, match="no weights of version 5"):
        again.restore(state, 5)
    again.publish({"norm.weight": network.norm.weight + 1})
    assert sorted(again._kept) == [7]


# --- what is watched -----------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False, None])
def test_a_round_counts_for_what_drafted_it(here: bool, elsewhere: bool | None) -> None:
    """On another server that may still be the loaded draft, or already another than serves here."""
    guard: Any = ShadowGuard(ShadowSettings(), SimpleNamespace(busy=False), None, None)  # type: ignore[arg-type]
    seen: list[bool] = []
    guard._monitor = SimpleNamespace(observe=lambda _length, loaded: seen.append(loaded))
    guard.observe(round_of([3], served_loaded=elsewhere), here)
    assert seen == [here if elsewhere is None else elsewhere]


# --- what is looked at ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alarm", "num_new", "trained"),
    [
        (False, 3, False),  # a look takes what there is, and only once
        (True, 64, False),  # after a fall at once
        (True, 0, False),  # if there is anything new
        (False, 0, False),
        (False, 20, True),  # an update is judged
        (False, 0, True),  # on what comes
    ],
)
def test_what_is_looked_at(alarm: bool, num_new: int, trained: bool) -> None:
    """Rows count as evidence once: only such are asked for as were never given. What serves, the
    candidate if one waits, and the draft as loaded are scored on the same ones."""
    seen: list[tuple[int, bool]] = []
    asked: list[list[Any]] = []

    def held_out(most: int, once: bool = False, at_least: int = 1) -> Any:
        seen.append((most, once))
        return SimpleNamespace(number=num_new) if num_new >= at_least else None

    def scores(batch: Any, weights: list[Any]) -> list[list[float]]:
        asked.append(weights)
        return [[2.0 - 0.1 * i] * batch.number for i in range(len(weights))]

    guard = ShadowGuard(
        ShadowSettings(),
        SimpleNamespace(scores=scores, busy=False),
        SimpleNamespace(held_out=held_out),
        SimpleNamespace(version=5, weights_of=lambda version: version),
    )
    monitor = guard._monitor
    monitor.looked_at, monitor.fall.tokens = (1000, 20.0) if alarm else (1000 * trained, 0.0)
    at = snapshot(round_index=1000, draft_version=5, serves_loaded=False)
    result = UpdateResult(1, 0, (1.0,), 1, 0.1) if trained else None
    verdict = guard.judge(result, at, candidate=lambda: "new")
    assert seen == [(128, True)]
    assert asked == ([[5, "new", 0] if trained else [5, 0]] if num_new else [])
    blocks = max(1, num_new // BLOCK) if num_new else 0
    assert monitor.worse.num_blocks == monitor.better.num_blocks == blocks
    assert verdict.action == ("wait" if trained else "keep")
    assert monitor.fall.alarmed == (alarm and not num_new)  # it waits for rows
    again = guard.judge(None, at, candidate=lambda: "new")
    assert again == Verdict("keep")
    assert len(seen) == (1 if num_new or trained else 2)


@pytest.mark.parametrize(
    ("chosen", "drafted", "scored"), [(False, 1.0, 4), (True, 0.0, 1), (True, 2.3, 3), (True, 4, 4)]
)
def test_drafts_are_scored_on_what_is_drafted(chosen: bool, drafted: float, scored: int) -> None:
    """Where the number of tokens is chosen while serving, those that are not drafted count for nothing."""
    target = make_target()
    drafter = make_drafter(target)
    served = serve(target, drafter, make_requests(target, count=2, prompt=9, new=40), max_batch=2)
    whole = collected(target, drafter, "delayed", None, served)
    asked: list[Any] = []

    def scores(batch: Any, weights: list[Any]) -> list[list[float]]:
        asked.append(batch)
        return [[2.0]] * len(weights)

    guard = ShadowGuard(
        ShadowSettings(),
        SimpleNamespace(scores=scores, busy=False),
        SimpleNamespace(held_out=lambda *_, **__: whole),
        SimpleNamespace(version=5, weights_of=lambda version: version),
        length_is_chosen=chosen,
    )
    seen = snapshot(round_index=1000, recent_drafted_tokens=drafted, serves_loaded=False)
    guard.judge(UpdateResult(1, 0, (1.0,), 1, 0.1), seen, candidate=lambda: "new")
    (batch,), scored = asked, min(scored, drafter.num_draft_tokens)
    assert torch.equal(batch.weights_RNK[..., :scored], whole.weights_RNK[..., :scored])
    assert not batch.weights_RNK[..., scored:].any()


def test_an_update_without_a_finite_step_is_no_candidate() -> None:
    """Nothing is scored for it, and what was known of the candidate stands."""
    guard = ShadowGuard(ShadowSettings(), SimpleNamespace(busy=False), None, None)
    for one in (guard, FiniteGuard()):
        result = UpdateResult(2, 2, (math.nan, math.nan), 1, 0.1)
        verdict = one.judge(result, snapshot(), candidate=lambda: pytest.fail("not asked for"))
        assert (verdict.action, verdict.num_rows) == ("wait", None)
    assert guard._monitor == Monitor()


def test_a_guard_keeps_no_weights_of_its_own() -> None:
    """It compares with what serves and with what was loaded, which are kept in any case."""
    configs = [load_config(SAMPLED, [f"adapt.guard.kind={kind}"]) for kind in ("finite", "shadow")]
    finite, shadow = (footprint(config, *sketch(config)) for config in configs)
    assert shadow.last_good == finite.last_good > 0


def test_scores_are_in_the_footprint() -> None:
    """Of as many rows as a look at what serves takes: the teacher's softmax, and the draft's logits,
    as they are and by the temperature, with theirs. They and a micro-step are never there together."""

    def sized(*more: str) -> Any:
        config = load_config(SAMPLED, ["adapt.guard={kind: shadow, anchors: 8}", *more])
        return footprint(config, *sketch(config))

    found = sized()
    target, drafter = sketch(load_config(SAMPLED))
    row = drafter.num_draft_tokens * target.vocab_size * 4
    assert found.scores > 4 * LOOKED_AT * 8 * row
    for step, larger in ((0, found.scores), (found.scores + 1, found.scores + 1)):
        assert replace(found, step=step).added == replace(found, step=0, scores=0).added + larger

    # In chunks what takes most is no longer the logits.
    assert sized("adapt.memory.chunk_rows=24").scores < found.scores - LOOKED_AT * 8 * row / 2
    assert sized("adapt.guard.anchors=1000").scores > 4 * (1024 - drafter.num_draft_tokens) * row
    assert sized("arms=[frozen]").scores == 0
    finite = load_config(SAMPLED, ["adapt.guard.kind=finite"])
    assert footprint(finite, *sketch(finite)).scores == 0


def test_the_guard_scores_in_the_chunks_of_the_loss() -> None:
    """Else it would hold logits of all rows beside a loss that does not."""
    arm = build_arm(world_of("adapt.memory.chunk_rows=5"), "adapted", Events())
    coscheduler: Any = arm.coscheduler
    assert coscheduler.guard.scorer.chunk_rows == 5


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapt.guard.kind=sentinel", r"adapt\.guard\.kind: .*'sentinel'; .*finite, shadow"),
        ("adapt.guard.anchors=0", r"adapt\.guard.*anchors|adapt\.guard\.anchors"),
        (
            "adapt.guard={kind: finite, anchors: 3}",
            r"adapt\.guard: .*anchors.*kind finite: nothing else",
        ),
        ("adapt.guard.false_publish=-1", r"adapt\.guard\.false_publish.*-1"),
        ("adapt.guard.false_rollback=1", r"adapt\.guard\.false_rollback.*1"),
        ("adapt.guard.anchor=3", r"adapt\.guard: .*`anchor`; allowed with kind shadow: anchors, "),
        ("adapt.guard.tolerance=0.1", r"`tolerance`; use false_publish instead; allowed"),
        ("adapt.guard.confidence=2", r"`confidence`; use false_publish instead; allowed"),
        ("adapt.guard.doubt=2", r"`doubt`; use false_rollback instead; allowed"),
        ("adapt.guard.patience=3", r"`patience`; use false_rollback instead; allowed"),
        ("adapt.guard.every=2", r"`every`; use anchors .*each update is judged.* instead; allowed"),
        ("adapt.guard.alarm_tokens=2", r"`alarm_tokens`; use check_rounds instead; allowed"),
        ("adapt.guard.check_every=2", r"`check_every`; use check_rounds instead; allowed"),
        ("adapt.guard.cooldown_rounds=2", r"`cooldown_rounds`; use check_rounds instead; allowed"),
        ("adapt.guard.trials=2", r"`trials`; use adapt\.policy .* instead; allowed"),
        ("adapt.guard.prospect_rows=2", r"`prospect_rows`; use adapt\.policy .* instead; allowed"),
        ("adapt.guard.prove_first=false", r"`prove_first`; use kind: finite .* instead; allowed"),
        ("adapt.guard.anchors=2000", r"adapt\.guard\.anchors: 2000.*window = 1024.*at most 1018"),
        (
            "adapt={policy: {kind: earned}, guard: {kind: finite}}",
            r"adapt\.guard\.kind: adapt\.policy\.kind = earned .*got finite; use shadow",
        ),
    ],
)
def test_bad_guards_are_named(override: str, says: str) -> None:
    """The message names the key and what came."""
    with pytest.raises(ConfigError, match=says):
        load_config(SAMPLED, ["adapt.guard.kind=shadow", override])


def test_another_kind_of_guard_leaves_the_old_ones_fields_behind(tmp_path: Path) -> None:
    path = tmp_path / "shadow.yaml"
    text = SAMPLED.read_text().replace("{kind: finite}", "{kind: shadow, anchors: 8}")
    path.write_text(text)
    assert load_config(path).adapt.guard.anchors == 8
    assert (
        load_config(path, ["adapt.guard.kind=finite"]).adapt.guard
        == type(load_config(SAMPLED).adapt.guard)()
    )
