"""How much of logits is held at once, and that holding less changes nothing.

Letters: R requests, N anchors, K drafted tokens, M rows, V vocabulary, H state width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.guard.scorer import AcceptanceScorer
from cosched.memory.live import LivePeak
from cosched.memory.peaks import loss_peak, scores_peak
from cosched.records import Acceptance, Decision, SignalBatch
from cosched.registry import DRAFTERS, LOSSES
from cosched.testing.harness import make_target, make_trainer
from cosched.testing.specimen import MetaTarget, as_batch, make_texts
from cosched.training.micro_step import BatchLoss

VOCAB, CHUNK, PATH = 20_000, 8, 4
QWEN3_VOCAB = 151_936
ROW_LOSSES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {},
    "total_variation": {},
    "negative_log_acceptance": {},
    "lk_hybrid": {},
    "hard_cross_entropy": {},
    "top_k_cross_entropy": {"k": 8},
}
SUM = {"terms": [{"kind": "forward_kl"}, {"kind": "proximal_kl", "weight": 0.5}]}
LOSSES_TO_TEST = {**ROW_LOSSES, "sum": SUM}
DRAFTERS_TO_TEST = (
    ("eagle3", "plain"),
    ("eagle3", "reduced vocabulary"),
    ("dflash", "plain"),
    ("pard", "qwen3"),
)

# Rows as wide as the vocabulary that a chunk makes at once, in chunks: what is saved for the
# gradient, and what an operation has beside it.
MOST = 10


@cache
def large_target() -> Target:
    return make_target(VOCAB, std=0.1)


@cache
def small_target() -> Target:
    return make_target(dtype=torch.float64)


def make_loss(kind: str, **own: Any) -> Any:
    cls = LOSSES.get(kind)
    raw = {"kind": kind, **LOSSES_TO_TEST[kind], **own}
    return cls(msgspec.convert(raw, cls.Settings))


def make_drafter(target: Target, kind: str, example: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    drafter = DRAFTERS.get(kind).examples(target, PATH)[example]
    copy = drafter.clone(dtype)
    copy.network().requires_grad_(True)
    return copy


def make_batch(target: Target, drafter: Any, num_anchors: int, num_texts: int = 2) -> SignalBatch:
    """Rows of random texts with random hidden states for teachers; all rows count."""
    texts = make_texts(target, drafter, count=num_texts, length=num_anchors + PATH + 8)
    anchors = torch.arange(2, num_anchors + 2).expand(num_texts, -1)
    batch = as_batch(texts, anchors, PATH, None)
    generator = torch.Generator().manual_seed(5)
    shape = (*batch.paths_RNK.shape, target.hidden_size)
    teacher = torch.randn(shape, generator=generator, dtype=target.dtype)
    return replace(batch, teacher_RNKX=teacher)


def is_logits(operation: Any, result: Tensor) -> bool:
    """What a head gives: a matrix product with the vocabulary last."""
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    return operation.overloadpacket in products and is_as_wide(operation, result)


def is_as_wide(operation: Any, result: Tensor) -> bool:
    """Whatever has the vocabulary last: logits, their gradient, softmaxes, products of them."""
    return result.ndim > 0 and result.shape[-1] in {VOCAB, QWEN3_VOCAB}


def peak_rows(module: BatchLoss, batch: SignalBatch, counts: Any) -> float:
    """Most rows of float32 logits, or of what is as wide, that a step holds at once."""
    module.begin_update(batch)
    with LivePeak(counts) as live:
        module(batch).backward()
    return live.peak / (4 * VOCAB)


def peaks(
    kind: str, example: str, loss: str, num_anchors: int, chunk_rows: int | None
) -> tuple[float, float]:
    """Of logits, and of all that is as wide, in chunks."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    batch = make_batch(target, drafter, num_anchors)
    own = {"acceptance_prefix": True, "hardest_share": 0.7}
    built = make_loss(loss, **own)
    module = BatchLoss(drafter, built, target.head, "hidden", chunk_rows=chunk_rows)
    logits, wide = (peak_rows(module, batch, counts) for counts in (is_logits, is_as_wide))
    return logits / CHUNK, wide / CHUNK


@pytest.mark.parametrize("loss", LOSSES_TO_TEST)
def test_logits_are_held_of_one_chunk(loss: str) -> None:
    """One chunk of the student's and one of the teacher's (and of the reference's, if asked for).

    Softmaxes, gradients and all else that is as wide are a fixed number of chunks, however many rows
    there are: 64, or twice as many. Without chunks the same count finds all rows.
    """
    sides = 3 if loss == "sum" else 2
    few, many = (peaks("eagle3", "plain", loss, anchors, CHUNK) for anchors in (8, 16))
    assert few[0] == many[0] == sides
    assert few[1] == many[1] <= MOST
    whole = peaks("eagle3", "plain", loss, 8, None)
    assert whole[0] == 64 / CHUNK * sides
    assert whole[1] > MOST


@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_logits_of_every_kind_of_head_are_held_of_one_chunk(kind: str, example: str) -> None:
    """The draft's own head, one over some tokens, the target's, and one tied to the embedding."""
    reduced = example == "reduced vocabulary"  # then only the teacher is as wide as is counted
    few, many = (peaks(kind, example, "forward_kl", anchors, CHUNK) for anchors in (8, 16))
    assert few[0] == many[0] == (1 if reduced else 2)
    assert few[1] == many[1] <= MOST
    assert peaks(kind, example, "forward_kl", 8, None)[0] == few[0] * 64 / CHUNK


def test_rows_that_do_not_count_are_not_projected() -> None:
    """Half of the rows have weight zero: their logits are never made."""
    target = large_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 8)
    batch.weights_RNK[:, ::2] = 0
    module = BatchLoss(drafter, make_loss("forward_kl"), target.head, "hidden")
    assert peak_rows(module, batch, is_logits) == 2 * 32
    batch.weights_RNK.zero_()  # a rank's share may have none at all
    assert peak_rows(module, batch, is_logits) == 0
    assert module(batch).item() == 0


def step(module: BatchLoss, batch: SignalBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    module.zero_grad()
    value = module(batch)
    value.backward()
    return value.detach(), gradients(module)


def gradients(module: BatchLoss) -> dict[str, Tensor]:
    named = module.network.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("loss", LOSSES_TO_TEST)
def test_chunks_equal_the_plain_form(loss: str) -> None:
    """In value and gradient of every weight, to float64's rounding; the last chunk is a short one.

    The plain form is the loss called with all logits. The draft has moved away from the reference,
    so a proximal term has a gradient.
    """
    target = small_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float64)
    batch = make_batch(target, drafter, 5)
    batch.weights_RNK[0, 1] = batch.weights_RNK[1, 2, 2:] = 0
    own = {"acceptance_prefix": True, "hardest_share": 0.9, "easiest_share": 0.8}
    modules = [
        BatchLoss(drafter, make_loss(loss, **own), target.head, "hidden", chunk_rows=chunk_rows)
        for chunk_rows in (None, 7, 1)
    ]
    for module in modules:
        module.begin_update(batch)
    before = drafter.replay(batch).detach()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.network().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.05)
    drafter.network().zero_grad()
    plain = make_loss(loss, None, **own)
    reference = before if plain.needs_reference else None
    teacher = modules[0].teacher_logits(batch)
    value = plain(drafter.replay(batch), teacher, batch.weights_RNK, reference)
    value.backward()
    expected = gradients(modules[0])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for module in modules:
        found, slopes = step(module, batch)
        torch.testing.assert_close(found, value.detach(), rtol=1e-11, atol=0)
        assert slopes.keys() == expected.keys()
        for name, slope in slopes.items():
            torch.testing.assert_close(slope, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_chunks_of_every_kind_of_head_equal_the_plain_form(kind: str, example: str) -> None:
    target = small_target()
    drafter = make_drafter(target, kind, example, torch.float64)
    batch = make_batch(target, drafter, 5)
    batch.weights_RNK[0, 1] = 0
    whole, chunked = (
        BatchLoss(drafter, make_loss("forward_kl"), target.head, "hidden", chunk_rows=chunk_rows)
        for chunk_rows in (None, 7)
    )
    (value, expected), (found, slopes) = (step(module, batch) for module in (whole, chunked))
    torch.testing.assert_close(found, value, rtol=1e-11, atol=0)
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, expected[name], rtol=1e-8, atol=1e-12)


def test_a_single_chunk_is_computed_once() -> None:
    """The backward pass computed it again, which saves no memory and takes a third of the time."""
    target = small_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float64)
    batch = make_batch(target, drafter, 5)
    module = BatchLoss(drafter, make_loss("forward_kl"), target.head, "hidden", chunk_rows=1000)
    seen, project = [], drafter.project
    drafter.project = lambda states_MH: seen.append(len(states_MH)) or project(states_MH)
    step(module, batch)
    assert seen == [batch.num_rows]


# --- what a guard scores -------------------------------------------------------------------


def make_scorer(
    target: Target,
    drafter: Any,
    chunk_rows: int | None,
    served_as: torch.dtype = torch.float32,
    acceptance: Acceptance = "sampled",
) -> AcceptanceScorer:
    copy = drafter.clone(torch.float32)
    return AcceptanceScorer(
        copy, target.head, "hidden", served_as, acceptance, temperature=0.7, chunk_rows=chunk_rows
    )


def two_of(drafter: Any) -> list[dict[str, Tensor]]:
    """Weights to be compared: the draft's own, and others."""
    own = {name: p.detach() for name, p in drafter.network().named_parameters()}
    generator = torch.Generator().manual_seed(2)
    return [
        own,
        {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in own.items()},
    ]


@pytest.mark.parametrize("acceptance", ["greedy", "target_only", "sampled"])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_scores_in_chunks_equal_the_plain_form(
    kind: str, example: str, acceptance: Acceptance
) -> None:
    """Of every candidate and anchor; chunks cut through anchors, and the last one is short.

    A product of fewer rows may add up in another order: a logit of about 10 is then off by up to
    1e-5 in float32, and so is a score, relatively.
    """
    target = make_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    batch = make_batch(target, drafter, 5)
    batch.weights_RNK[0, 1] = 0
    weights = two_of(drafter)
    whole, *chunked = (
        make_scorer(target, drafter, chunk_rows, torch.bfloat16, acceptance).scores(batch, weights)
        for chunk_rows in (None, 7, 1)
    )
    assert [len(scores) for scores in whole] == [9, 9]
    # Of random drafts the target's best token is hardly ever the draft's, whatever their weights.
    assert acceptance == "greedy" or whole[0] != whole[1]
    for scores in chunked:
        for found, expected in zip(scores, whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_scores_hold_logits_of_one_chunk(kind: str, example: str) -> None:
    """However many rows are scored, and of however many drafts; without chunks, of all rows.

    A chunk of the teacher has become its softmax when the student's is made.
    """
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)

    def peak(num_anchors: int, chunk_rows: int | None, counts: Any) -> float:
        batch = make_batch(target, drafter, num_anchors, num_texts=1)
        scorer = make_scorer(target, drafter, chunk_rows)
        with LivePeak(counts) as live:
            scorer.scores(batch, two_of(drafter))
        return live.peak / (4 * VOCAB * CHUNK)

    for counts, most in ((is_logits, 1), (is_as_wide, MOST)):
        few, many = (peak(num_anchors, CHUNK, counts) for num_anchors in (8, 16))
        assert 1 <= few == many <= most
        assert peak(16, None, counts) >= 64 / CHUNK


def test_without_chunks_the_teacher_is_recalled_once() -> None:
    """Whatever the number of drafts; a chunk's is recalled for each, here of 64 rows in 8 chunks."""
    target = make_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 16, num_texts=1)
    rows: list[int] = []
    hook = target.head.register_forward_hook(lambda *call: rows.append(len(call[-1])))
    for chunk_rows, expected in ((None, [64]), (CHUNK, [CHUNK] * 8 * 2)):
        rows.clear()
        make_scorer(target, drafter, chunk_rows).scores(batch, two_of(drafter))
        assert rows == expected
    hook.remove()


@pytest.mark.slow
def test_at_a_real_vocabulary_two_chunks_of_logits_are_held() -> None:
    """A training step of 512 rows at 152k tokens, and scores of as many: the student's and the
    teacher's logits are there of 32 rows at a time, 2 x 19 MB in place of 2 x 311 MB."""
    chunk_rows = 32
    target = make_target(QWEN3_VOCAB, std=0.1)
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 512 // PATH, num_texts=1)
    assert batch.weights_RNK.count_nonzero() == 512
    loss = make_loss("jensen_shannon")
    trainer = make_trainer(target, drafter, loss=loss, chunk_rows=chunk_rows)
    with LivePeak(is_logits) as stepping:
        trainer.update(batch, Decision(1))
    scorer = AcceptanceScorer(
        trainer._batch_loss._drafter, target.head, "hidden", torch.bfloat16, chunk_rows=chunk_rows
    )
    with LivePeak(is_logits) as scoring:
        serving, candidate = scorer.scores(batch, two_of(drafter))
    assert len(serving) == len(candidate) == 512 // PATH
    chunk = 4 * QWEN3_VOCAB * chunk_rows
    assert chunk <= stepping.peak <= 2 * chunk
    assert chunk <= scoring.peak <= 2 * chunk


# --- what `cosched check` says -------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, CHUNK])
@pytest.mark.parametrize("loss", ["forward_kl", "sum"])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_the_peak_of_sizes_is_that_of_a_step(
    kind: str, example: str, loss: str, chunk_rows: int | None
) -> None:
    """Counted on the meta device it is what the same rows take when they are computed."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    batch = make_batch(target, drafter, 8)
    module = BatchLoss(drafter, make_loss(loss), target.head, "hidden", chunk_rows=chunk_rows)
    states = drafter.replay_states(batch).detach().flatten(0, 2).requires_grad_()
    reference = states.detach() if loss == "sum" else None
    teacher, weights = batch.teacher_RNKX.flatten(0, 2), batch.weights_RNK
    module.begin_update(batch)
    with LivePeak() as live:
        measured = module.measure(states, teacher, torch.arange(len(states)), reference)
        module._loss.reduce(measured.unflatten(0, weights.shape), weights).backward()
    sketch, sizes = drafter.clone(torch.float32), MetaTarget(target)
    sketch.network().to("meta")
    sketch._target = sizes
    found = loss_peak(
        sketch,
        [name for name, _ in drafter.network().named_parameters()],
        make_loss(loss),
        sizes.head,
        "hidden",
        teacher[:0].to("meta"),
        num_rows=64,
        chunk_rows=chunk_rows,
    )
    # What is measured of each row lives on, here of 3 chunks in place of 8.
    assert found == pytest.approx(live.peak, rel=0.02)
    logits = 4 * VOCAB * (chunk_rows or 64)
    assert found > (1 if example == "reduced vocabulary" else 2) * logits


@pytest.mark.parametrize("chunk_rows", [None, CHUNK])
@pytest.mark.parametrize("served_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_the_peak_of_sizes_is_that_of_scores(
    kind: str, example: str, served_as: torch.dtype, chunk_rows: int | None
) -> None:
    """Of two drafts, scored from a batch on, as a guard has it done."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    batch = make_batch(target, drafter, 16, num_texts=1)
    scorer = make_scorer(target, drafter, chunk_rows, served_as)
    weights = two_of(drafter)
    with LivePeak() as live:
        scorer.scores(batch, weights)
    sketch, sizes = drafter.clone(torch.float32), MetaTarget(target)
    sketch.network().to("meta")
    sketch._target = sizes
    found = scores_peak(
        sketch,
        list(weights[0]),
        served_as,
        sizes.head,
        "hidden",
        batch.teacher_RNKX.flatten(0, 2)[:0].to("meta"),
        num_rows=64,
        chunk_rows=chunk_rows,
    )
    # The draft's states, and what is kept to make them, are not of the vocabulary's size.
    assert found == pytest.approx(live.peak, rel=0.02)
    logits = 4 * VOCAB * (chunk_rows or 64)
    copies = 4 * sum(w.numel() for w in weights[0].values()) * (served_as != torch.float32)
    assert found > copies + (1 if example == "reduced vocabulary" else 2) * logits
