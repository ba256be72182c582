"""Rounds that draft unequally many tokens: the text, the rows, what is kept of them, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.slots import uniforms_for
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import ForcedVerifier, SamplingVerifier
from cosched.engines.request import GenerationRequest
from cosched.loop.lengths import DraftLengths
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.records import Rows, Segment, ServedBlock, VerifyRound
from cosched.registry import LENGTHS
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.metrics import RequestLog, round_figures
from cosched.testing.harness import (
    Watcher,
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
)
from cosched.testing.sampling import FALSE_ALARM, p_values, sampling_target
from tests.helpers.drafts import Lookup, make_drafter
from tests.helpers.experiments import new_folder, rounds_of, write
from tests.helpers.lengths import ByTurns, Scripted

SCRIPT = (3, 0, 2, 1, 0, 0, 3)


# --- the text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_round_drafts_as_many_as_it_is_told(target: Target, max_batch: int) -> None:
    """Greedy text is plain decoding's, and blocks are as long as the script says, none left out."""
    requests = make_requests(target, count=4, prompt=6, new=60)
    watcher, drafter = Watcher(), make_drafter(target)
    lengths = DraftLengths(Scripted(*SCRIPT), 3)
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher, lengths=lengths)
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    rounds = [round_ for round_ in watcher.rounds if round_.blocks]
    for number, round_ in enumerate(rounds):
        assert {len(block.path_K) for block in round_.blocks} == {SCRIPT[number % len(SCRIPT)]}
        assert all(len(block.teacher_KX) == len(block.path_K) for block in round_.blocks)
        assert len(round_.blocks) == round_.num_running


def test_fixed_is_as_ever(target: Target) -> None:
    """The policy that drafts as many as it can gives sampled text to the bit as no policy does."""
    requests = make_requests(target, count=3, prompt=6, new=60)
    verifier = SamplingVerifier(SamplingParams(1.0))
    cls = LENGTHS.get("fixed")
    texts = [
        decode(
            make_engine(
                target, make_drafter(target), requests, 2, verifier=verifier, lengths=lengths
            ),
            requests,
        )
        for lengths in (None, DraftLengths(cls(cls.Settings(kind="fixed")), 3))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("max_batch", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_requests_of_a_round_draft_unequally_many(target: Target, max_batch: int) -> None:
    """Rows are packed, drafts are cut, and greedy text is the target's while the draft learns."""
    requests = make_requests(target, count=4, prompt=6, new=60)
    drafter = make_drafter(target)
    watcher = Watcher(make_coscheduler(target, drafter, every=3, lr=3e-3))
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher, lengths=ByTurns(3))
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    ragged = [{len(b.path_K) for b in round_.blocks} for round_ in watcher.rounds]
    assert sum(len(found) > 1 for found in ragged) > len(ragged) / 2


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(1.0), marks=pytest.mark.slow),
        SamplingParams(0.7, top_p=0.8),
    ],
)
@pytest.mark.parametrize("tokens_alone", [False, True])
def test_sampled_text_of_ragged_rounds_follows_the_target(
    sampling: SamplingParams, tokens_alone: bool
) -> None:
    """Behind a draft that was cut short the next token is the target's own, with or without q."""
    target = sampling_target()
    drafter = Lookup(6, 2) if tokens_alone else make_drafter(target, num_draft_tokens=2)
    found = p_values(target, drafter, SamplingVerifier(sampling), sampling, None, 1000, ByTurns(2))
    assert min(found) > FALSE_ALARM


def test_packed_rows_are_those_of_each_request_alone(target: Target) -> None:
    """Logits, hidden states, features and cache of a ragged pass, held against one request a pass."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, target.vocab_size, (3, 9), generator=generator)
    starts, counts = [4, 5, 2], [3, 1, 4]
    positions_BT = torch.tensor(starts)[:, None] + torch.arange(4)
    next_BT = torch.randint(1, target.vocab_size, (3, 4), generator=generator)
    together = target.new_cache(3, 16)
    for slot, start in enumerate(starts):
        at = torch.arange(start)[None]
        target.forward(ids_BT[slot : slot + 1, :start], at, together, first_slot=slot)
    packed = target.forward(next_BT, positions_BT, together, (0, 2), counts=counts)
    for slot, (start, count) in enumerate(zip(starts, counts, strict=True)):
        alone = target.new_cache(1, 16)
        target.forward(ids_BT[slot : slot + 1, :start], torch.arange(start)[None], alone)
        rows = slice(slot, slot + 1), slice(count)
        own = target.forward(next_BT[rows], positions_BT[rows], alone, (0, 2))
        for ours, theirs in (
            (packed.logits_BTV, own.logits_BTV),
            (packed.hidden_BTH, own.hidden_BTH),
            (packed.features_BTF, own.features_BTF),
        ):
            assert torch.allclose(ours[rows], theirs, rtol=1e-4, atol=1e-4)  # sums in another order
            assert not ours[slot, count:].any()
        end = start + count
        for ours, theirs in zip(together.slots, alone.slots, strict=True):
            assert torch.allclose(ours.keys[slot, :, :end], theirs.keys[0, :, :end], atol=1e-4)


# --- luck --------------------------------------------------------------------------------------


def test_a_places_luck_does_not_depend_on_how_many_are_drafted() -> None:
    """Numbers to choose, to accept and to draw are the first of those that more tokens would have."""
    drawn_BU = torch.rand(2, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms_for(drawn_BU, 5), drawn_BU)
    two_BU = uniforms_for(drawn_BU, 2)
    assert torch.equal(two_BU, drawn_BU[:, [0, 1, 5, 6, 10]])
    assert torch.equal(uniforms_for(drawn_BU, 0), drawn_BU[:, 10:])


@pytest.mark.parametrize("kind", ["sampled", "document"])
def test_arms_of_unequal_lengths_are_paired(target: Target, kind: Any) -> None:
    """Led along one text, what a short draft has accepted from a place a long one has, too."""
    generator = torch.Generator().manual_seed(1)
    text_T = torch.randint(1, 9, (120,), generator=generator)
    request = GenerationRequest("given", text_T[:8], 112, text_T)
    accepted: list[dict[int, int]] = []
    for script in (1, 2, 3):
        watcher = Watcher()
        engine = make_engine(
            target,
            make_drafter(target),
            [request],
            verifier=ForcedVerifier(kind, SamplingParams(1.0)),
            observer=watcher,
            lengths=DraftLengths(Scripted(script), 3),
        )
        assert decode(engine, [request])["given"] == text_T[8:].tolist()
        blocks = [block for round_ in watcher.rounds for block in round_.blocks]
        accepted.append({block.anchor: block.num_accepted for block in blocks})
    for most, found in ((1, accepted[0]), (2, accepted[1])):
        common = found.keys() & accepted[2].keys() & set(range(8, 115))
        assert len(common) > 10
        assert all(found[place] == min(most, accepted[2][place]) for place in common)


# --- the draft's cache -------------------------------------------------------------------------


class Slow:
    """A clock on which one round of many is slow."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_draft_that_was_left_out_drafts_on_as_if_it_had_not_been(target: Target) -> None:
    """Behind rounds without drafts it proposes what it would have proposed with all of them."""
    requests = make_requests(target, count=3, prompt=6, new=80)
    proposals: list[dict[tuple[str, int], list[int]]] = []
    for script in ((3,), (0,) * 9 + (3,)):
        watcher, drafter = Watcher(), make_drafter(target)
        lengths = DraftLengths(Scripted(*script), 3)
        engine = make_engine(target, drafter, requests, 3, observer=watcher, lengths=lengths)
        decode(engine, requests)
        blocks = [block for round_ in watcher.rounds for block in round_.blocks]
        proposals.append(
            {(b.request_id, b.anchor): b.path_K.tolist() for b in blocks if len(b.path_K)}
        )
    common = proposals[0].keys() & proposals[1].keys()
    assert len(common) > 5
    assert all(proposals[0][place] == proposals[1][place] for place in common)


def test_goodput_drafts_nothing_where_rows_are_dear(target: Target) -> None:
    """With time that passes by rows alone, a draft that is never accepted comes not to be asked."""
    requests = make_requests(target, count=2, prompt=6, new=200)
    cls = LENGTHS.get("goodput")
    lengths, watcher, clock = DraftLengths(cls(cls.Settings(kind="goodput")), 3), Watcher(), Slow()

    class Dear(LiveRows):
        def verify(self, ids_BS, positions_BS, counts=None):
            clock.now += 20 * ids_BS.numel()
            return super().verify(ids_BS, positions_BS, counts)

    engine = EmbeddedEngine(
        rows=Dear(target, 2, 220, (0, 1, 2)),
        verifier=SamplingVerifier(SamplingParams(1.0)),
        drafter=make_drafter(target),
        options=EngineOptions(2, 210, 0, frozenset()),
        device=target.device,
        observer=watcher,
        clock=clock,
        lengths=lengths,
    )
    decode(engine, requests)
    drafted = [len(r.blocks[0].path_K) for r in watcher.rounds if r.blocks]
    assert drafted[:4] == [1, 1, 0, 0]
    assert sum(drafted[20:]) < 0.1 * len(drafted[20:])


# --- what is kept of the rounds ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected", "anchors"),
    [
        ("accepted", [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], [5, 6, 9]),
        ("all", [[1, 0.5, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0.5]], [5, 6, 9]),
        ("refused", [[1, 0, 0, 0], [0, 0, 1, 0]], [5, 9]),
        ("delayed", None, None),
    ],
)
def test_short_blocks_teach_what_they_have(
    rows: Rows, expected: list[list[float]] | None, anchors: list[int] | None
) -> None:
    """Places that were not drafted weigh nothing, and blocks without drafts are left out.

    Committed paths have all their rows, however little was drafted.
    """
    path, width = 4, 8
    limits = ReplayLimits(64, 64, path, 1 << 20, 1 << 30, 0, 4 * width)
    buffer = ReplayBuffer(limits, rows, None, refused_weight=0.5)
    tokens = torch.arange(1, 22)
    segment = Segment("r", 0, tokens, None, torch.randn(20, width))
    blocks = tuple(
        ServedBlock("r", anchor, tokens[:drafted], torch.randn(drafted, width), accepted, 1)
        for anchor, drafted, accepted in ((5, 2, 0), (6, 2, 2), (8, 0, 0), (9, 4, 2))
    )
    buffer.collect(VerifyRound((segment,), blocks, (), 0.0, 0.0, 1))
    batch = buffer.sample()
    assert batch is not None
    assert batch.paths_RNK.shape[-1] == batch.teacher_RNKX.shape[2] == path
    if expected is None:
        assert bool((batch.weights_RNK == 1).all())
    else:
        assert batch.weights_RNK[0].tolist() == expected
        assert batch.anchors_RN[0].tolist() == anchors


@pytest.mark.parametrize("rows", ["accepted", "refused", "all", "delayed"])
@pytest.mark.parametrize(
    "lengths",
    [
        ByTurns,
        pytest.param(
            lambda most: DraftLengths(Scripted(*SCRIPT), most), marks=pytest.mark.slow, id="script"
        ),
    ],
)
def test_a_draft_learns_from_rounds_of_any_length(target: Target, rows: Rows, lengths: Any) -> None:
    """Updates are made of finite losses, from whatever rows it is told to learn."""
    requests = make_requests(target, count=3, prompt=6, new=60)
    drafter = make_drafter(target)
    teacher = make_coscheduler(target, drafter, every=4, rows=rows)
    engine = make_engine(target, drafter, requests, 3, observer=teacher, lengths=lengths(3))
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    assert teacher.version > 3
    assert all(loss is not None for loss in teacher.counters.losses)


def test_figures_are_of_what_was_drafted(target: Target) -> None:
    """The mean and the counts of drafted tokens; a place's acceptance is of rounds that drafted it."""
    requests = make_requests(target, count=2, prompt=6, new=60)
    engine = make_engine(
        target, make_drafter(target), requests, lengths=DraftLengths(Scripted(0, 2), 3)
    )
    logs = [
        RequestLog(done.request.id, done.request.prompt_P.tolist(), done.tokens, done.rounds)
        for done in engine.generate(requests)
    ]
    figures = round_figures(logs)
    assert sum(figures.rounds_by_drafted) == figures.rounds
    assert figures.rounds_by_drafted[1] == 0
    assert figures.drafted_per_round == 2 * figures.rounds_by_drafted[2] / figures.rounds
    assert len(figures.position_acceptance) == 2


# --- files and runs ----------------------------------------------------------------------------


def with_length(settings: dict, **length: Any) -> dict:
    settings["drafter"] |= {"num_draft_tokens": 3, "length": length}
    return settings


@pytest.mark.slow
@pytest.mark.long
def test_a_run_says_how_many_tokens_were_drafted(tmp_path: Path, settings: dict) -> None:
    """Frozen and adapted arms choose their lengths, texts are equal, and summary and report tell."""
    settings["arms"] = ["plain", "frozen", "adapted"]
    settings["workload"]["max_new_tokens"] = 24
    config = load_config(write(tmp_path, with_length(settings, kind="threshold", bound=0.3)))
    folder = new_folder(config)
    summary = Experiment(config).run(folder)
    assert summary.run["length"] == "threshold"
    for name in ("frozen", "adapted"):
        arm = summary.arms[name]
        assert arm.lossless_mismatches == 0
        assert 0 < arm.drafted_per_round < 3
        assert sum(count > 0 for count in arm.rounds_by_drafted) > 1
    assert summary.arms["plain"].drafted_per_round == 0
    from cosched.report.html import write_report

    page = write_report(folder.path).read_text()
    assert "up to 3 (threshold) tokens drafted per round" in page
    assert f"frozen drafted {summary.arms['frozen'].drafted_per_round:.2f} tokens a round" in page


@pytest.mark.slow
def test_a_trace_has_the_rounds_of_the_engine_at_changing_lengths(
    tmp_path: Path, settings: dict
) -> None:
    """Recorded while rounds are ragged, and judged on the recording: the same rounds, one by one."""
    settings["arms"] = ["frozen"]
    settings["engine"]["max_batch"] = 2
    settings["workload"] |= {"max_new_tokens": 64, "max_prompts": 2}
    config = load_config(write(tmp_path, with_length(settings, kind="threshold", bound=0.5)))
    folder = new_folder(config)
    Experiment(config, record=True).run(folder)
    settings["engine"] |= {"kind": "trace", "trace": str(folder.path / "trace")}
    settings["run"]["name"] = "judged"
    config = load_config(write(tmp_path, settings))
    judged = new_folder(config)
    Experiment(config).run(judged)
    rows = [rounds_of(one.path, "frozen") for one in (folder, judged)]
    assert rows[0] == rows[1]
    assert len({row[3] for row in rows[0]}) > 1
