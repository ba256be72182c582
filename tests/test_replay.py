"""Which rows of what was served teach, and how much, by what the drafter knew when it drafted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.build.embedded import build_world, load_drafter
from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.records import Rows, Segment, ServedBlock, VerifyRound
from cosched.registry import DRAFTERS
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import NoEvents
from cosched.testing.harness import make_buffer, make_requests, serve

K, WIDTH = 4, 8
QUICKSTART, SAMPLED = Path("configs/quickstart.yaml"), Path("configs/sampled.yaml")


def buffer_with_blocks(rows: Rows, refused_weight: float) -> ReplayBuffer:
    """One request of 20 rows with blocks that were accepted to 0, 2 and 4 of 4 drafts."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 64, K, 1 << 20, 1 << 30, 0, 4 * WIDTH), rows, None, refused_weight
    )
    tokens = torch.arange(21)
    segment = Segment("r", 0, tokens, None, torch.randn(20, WIDTH))
    blocks = tuple(
        ServedBlock("r", anchor, tokens[:K], torch.randn(K, WIDTH), accepted, accepted + 1)
        for anchor, accepted in ((5, 0), (6, 2), (9, 4))
    )
    buffer.collect(VerifyRound((segment,), blocks, (), 0.0, 0.0, 1))
    return buffer


def test_what_is_drawn_says_at_which_temperature_each_request_samples() -> None:
    """Requests of one batch have their own, held out as sampled."""
    buffer = ReplayBuffer(ReplayLimits(64, 8, K, 1 << 20, 1 << 30, 0, 4 * WIDTH), "delayed", None)
    temperatures = {"a": 0.0, "b": 0.7, "c": 1.3}
    for name, temperature in temperatures.items():
        rows = torch.randn(20, WIDTH)
        segment = Segment(name, 0, torch.arange(21), None, rows, temperature=temperature)
        buffer.collect(VerifyRound((segment,), (), (), 0.0, 0.0, 1))
    sample, held_out = buffer.sample(), buffer.held_out(8)
    assert sample is not None
    assert held_out is None  # all has been in the sample
    assert sample.temperatures == (0.0, 0.7, 1.3)


@pytest.mark.parametrize(
    ("rows", "refused_weight", "expected"),
    [
        # Row a, of the refused token itself, stands on accepted text and counts in full.
        ("accepted", 1.0, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        ("all", 1.0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ("all", 0.25, [[1, 0.25, 0.25, 0.25], [1, 1, 1, 0.25], [1, 1, 1, 1]]),
        ("all", 0.0, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_weights_behind_a_refusal(
    rows: Rows, refused_weight: float, expected: list[list[float]]
) -> None:
    """Cut, kept, or kept with less weight; never the rows up to the refusal."""
    batch = buffer_with_blocks(rows, refused_weight).sample()
    assert batch is not None
    assert batch.weights_RNK[0].tolist() == expected
    assert batch.anchors_RN[0].tolist() == [5, 6, 9]


def test_only_where_the_draft_was_wrong() -> None:
    """``rows: refused``: the row of the first refusal alone; an accepted block teaches nothing."""
    batch = buffer_with_blocks("refused", 1.0).sample()
    assert batch is not None
    assert batch.anchors_RN[0].tolist() == [5, 6]  # 9 was accepted whole
    assert batch.weights_RNK[0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def round_to(length: int, request: str, grown: int, **changes: Any) -> VerifyRound:
    """A request's text grows by some rows to ``length``, from one block refused at once."""
    start = length - grown
    segment = Segment(request, start, torch.arange(start, length + 1), None, torch.ones(grown, 8))
    path = torch.zeros(K, dtype=torch.int64)
    block = ServedBlock(request, start, path, torch.ones(K, WIDTH), 0, 1)
    blocks = (block,) if start else ()
    return VerifyRound((segment,), blocks, changes.get("finished", ()), 0.0, 0.0, 1)


def named_round(length: int, request: str, name: int, grown: int = 0, **changes: Any) -> Any:
    """The same, and every feature is the request's name."""
    one = round_to(length, request, grown or length, **changes)
    features = torch.full((grown or length, 1), float(name))
    return replace(one, segments=(replace(one.segments[0], features_RF=features),))


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    # Of 20 rows all have been served at anchor 20 and later; committed paths end at the last row.
    [("delayed", list(range(1, 17)), [17, 18]), ("accepted", [20], [21])],
)
def test_fresh_anchors_teach_once(rows: Rows, first: list[int], second: list[int]) -> None:
    """What one update has seen no later one sees; without new text there is nothing to train on."""
    limits = ReplayLimits(64, 64, K, 1 << 20, 1 << 30, 0, 4 * WIDTH)
    buffer = ReplayBuffer(limits, rows, None, fresh=True)
    everything = ReplayBuffer(limits, rows, None)
    for one in (buffer, everything):
        one.collect(round_to(20, "r", 20))
        if rows == "accepted":
            one.collect(round_to(21, "r", 1))
    seen = [buffer.sample()]
    assert buffer.sample() is None
    for one in (buffer, everything):
        one.collect(round_to(22, "r", 22 - (21 if rows == "accepted" else 20)))
    seen.append(buffer.sample())
    assert [batch and batch.anchors_RN[0].tolist() for batch in seen] == [first, second]
    again = everything.sample()
    assert again is not None
    assert again.anchors_RN[0].tolist() == first + second


def test_a_finished_request_teaches_once_and_goes() -> None:
    """``keep_finished`` with ``fresh``: kept for the next update, forgotten behind it."""
    limits = ReplayLimits(64, 64, K, 1 << 20, 1 << 30, 0, 4 * WIDTH)
    buffer = ReplayBuffer(limits, "delayed", None, keep_finished=True, fresh=True)
    buffer.collect(round_to(20, "done", 20, finished=("done",)))
    buffer.collect(round_to(20, "runs", 20))
    batch = buffer.sample()
    assert batch is not None
    assert len(batch.starts_R) == 2
    assert buffer.num_tokens == 20
    buffer.collect(round_to(30, "runs", 10))
    batch = buffer.sample()
    assert batch is not None
    assert batch.anchors_RN.tolist() == [list(range(17, 27))]


def test_finished_requests_teach_where_no_running_one_can() -> None:
    """``keep_finished``: never more anchors than asked for, the newest requests', however many wait."""
    limits = ReplayLimits(64, 16, K, 1 << 20, 1 << 30, 0, 4 * WIDTH)
    buffer = ReplayBuffer(limits, "delayed", None, keep_finished=True)

    def trained() -> dict[int, int]:
        """How many anchors of each request, by the name that its features have."""
        batch = buffer.sample()
        assert batch is not None
        counts = (batch.weights_RNK[:, :, 0] > 0).sum(1).tolist()
        return dict(zip(batch.features_RCF[:, 0, 0].tolist(), counts, strict=True))

    for number in range(40):
        request = f"done-{number}"
        buffer.collect(named_round(20, request, number, finished=(request,)))
    assert trained() == dict.fromkeys(range(24, 40), 1)
    buffer.collect(named_round(3, "runs", 99))
    assert trained() == dict.fromkeys(range(24, 40), 1)  # too short yet to teach
    buffer.collect(named_round(30, "runs", 99, grown=27))
    assert trained() == {99: 16}


def test_fresh_anchors_teach_once_also_when_others_finish() -> None:
    """The fewer requests, the more rows of each are held out: what was drawn stays drawn."""
    limits = ReplayLimits(256, 64, K, 1 << 20, 1 << 30, 0, 4 * WIDTH)
    buffer = ReplayBuffer(limits, "delayed", None, fresh=True, held_out=32)
    others = [f"other-{number}" for number in range(7)]
    for number, request in enumerate(["it", *others]):
        buffer.collect(named_round(60, request, number))
    seen: list[int] = []
    for length in (62, 90, 150):
        batch = buffer.sample()
        if batch is not None:
            it = batch.features_RCF[:, 0, 0] == 0
            anchors = (batch.starts_R[:, None] + batch.anchors_RN)[it]
            seen += anchors[batch.weights_RNK[it][..., 0] > 0].tolist()
        for number, request in enumerate(others, 1):
            if length == 62:
                buffer.collect(named_round(61, request, number, grown=1, finished=(request,)))
        grown = length - {62: 60, 90: 62, 150: 90}[length]
        buffer.collect(named_round(length, "it", 0, grown=grown))
    assert len(seen) == len(set(seen)) > 8


def test_committed_text_has_no_refusals() -> None:
    """``rows: delayed`` teaches what was said: every row counts, whatever the weight of refusals."""
    batch = buffer_with_blocks("delayed", 0.25).sample()
    assert batch is not None
    assert batch.anchors_RN[0].tolist() == list(range(1, 17))
    assert batch.weights_RNK.min() == 1


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_context_that_no_window_reaches_is_left_out(kind: str, target: Target) -> None:
    """Of 60 rows before the newest anchors; the draft says of them what it would say with all."""
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    rounds = serve(target, drafter, make_requests(target, 1, 8, 60))
    batches = []
    for draft_window in (None, 12):
        buffer = make_buffer(target, drafter, "delayed", draft_window, window=400, anchors=5)
        for round_ in rounds[:-1]:  # the last one ends the request
            buffer.collect(round_)
        batch = buffer.sample()
        assert batch is not None
        batches.append(batch)
    whole, cut = batches
    places = [(batch.starts_R + batch.anchors_RN[0]).tolist() for batch in batches]
    assert places[0] == places[1]
    assert int(cut.lengths_R) == 12 + 1 + 4 + drafter.num_draft_tokens  # to the fifth
    assert whole.tokens_RC1.shape[1] > 60
    with torch.no_grad():
        expected = drafter.replay(replace(whole, window=12))
        assert torch.allclose(drafter.replay(cut), expected, atol=1e-5)
        assert not torch.allclose(drafter.replay(whole), expected, atol=1e-2)


@pytest.mark.parametrize(("kind", "weight"), [("eagle3", 1.0), ("dflash", 0.3), ("pard", 0.3)])
def test_a_chain_keeps_its_own_path(kind: str, weight: float) -> None:
    """A chain is trained on the path that it drafted itself; a block did not know its own path."""
    config = load_config(
        SAMPLED,
        [f"drafter.kind={kind}", "adapt.loss.rows=all", "workload.max_prompts=1"],
    )
    world = build_world(config)
    coscheduler = build_coscheduler(
        config, world.target, load_drafter(world), None, None, NoEvents()
    )
    assert coscheduler.buffer.refused_weight == weight


def test_recording_for_other_drafters(tmp_path: Path) -> None:
    """Layers that the target lacks are refused; so is an arm that has only its own features."""

    def experiment(*overrides: str) -> None:
        config = load_config(
            QUICKSTART,
            ["workload.max_prompts=1", f"run.dir={tmp_path}", *overrides],
        )
        Experiment(config, record=True)

    with pytest.raises(ConfigError, match=r"record\.feature_layers.*0 to 15.*16.*not 17"):
        experiment("record.feature_layers=[17]")
    with pytest.raises(ConfigError, match=r"'frozen'.*plain as the first arm"):
        experiment("record.feature_layers=[3]", "arms=[frozen]")


@pytest.mark.parametrize("rows", ["delayed", "accepted"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_ended_requests_left_is_gone_on_with(rows: Rows, fresh: bool) -> None:
    """A run that is resumed learnt from fewer rows than one that was not: its next loss was another."""
    limits = ReplayLimits(24, 16, K, 1 << 20, 1 << 30, 0, 4 * WIDTH)

    def buffer() -> ReplayBuffer:
        return ReplayBuffer(limits, rows, 8, keep_finished=True, fresh=fresh, held_out=4)

    one, other = buffer(), buffer()
    for number, request in enumerate(["a", "b", "ü"]):
        one.collect(named_round(20, request, number))
        one.collect(named_round(23, request, number, grown=3))
        one.held_out(4, once=True)
        one.collect(named_round(41 + number, request, number, grown=18 + number))
        if number == 1:
            one.sample()
        one.collect(named_round(44 + number, request, number, grown=3, finished=(request,)))
    other.restore({"weight.w": torch.zeros(1), **one.state()})
    assert other.num_tokens == one.num_tokens > 0
    for _ in range(2):
        for both in (one, other):
            both.collect(named_round(30, "runs", 9))
        given, expected = other.held_out(4, once=True), one.held_out(4, once=True)
        assert same_batch(given, expected)
        assert same_batch(other.sample(), one.sample())
        for both in (one, other):
            both.collect(named_round(33, "runs", 9, grown=3, finished=("runs",)))


def same_batch(one: Any, other: Any) -> bool:
    """Every tensor of them, to the bit; or none of both."""
    if one is None or other is None:
        return one is other
    for name in ("starts_R", "lengths_R", "tokens_RC1", "features_RCF", "anchors_RN", "paths_RNK",
                 "teacher_RNKX", "weights_RNK"):  # fmt: skip
        if not torch.equal(getattr(one, name), getattr(other, name)):
            return False
    return one.temperatures == other.temperatures
