"""How much of logits is held at once, by losses and by scores, and what sizes say of it.

Letters: R requests, N anchors, K drafted tokens, M rows, V vocabulary, H state width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cosched.guard.scorer import AcceptanceScorer
from cosched.memory.live import LivePeak
from cosched.memory.peaks import loss_peak, scores_peak
from cosched.records import Decision
from cosched.testing.harness import make_target, make_trainer
from cosched.testing.specimen import MetaTarget
from cosched.training.micro_step import BatchLoss
from tests.helpers.chunks import (
    CHUNK,
    DRAFTERS_TO_TEST,
    LOSSES_TO_TEST,
    MOST,
    PATH,
    QWEN3_VOCAB,
    VOCAB,
    is_as_wide,
    is_logits,
    large_target,
    make_batch,
    make_drafter,
    make_loss,
    make_scorer,
    peak_rows,
    two_of,
)


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
    copy = drafter.clone(torch.float32)
    scorer = AcceptanceScorer(copy, target.head, "hidden", torch.bfloat16, chunk_rows=chunk_rows)
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
