"""What an update learns from: losses of rows, shares of a batch, and their gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.loop.teacher_rows import distinct
from cosched.protocols import LossSettings
from cosched.records import Decision, SignalBatch
from cosched.registry import DRAFTERS, LOSSES
from cosched.testing.harness import collected, make_requests, make_trainer, serve
from cosched.training.micro_step import ROWS_OF_LOST_MASS, BatchLoss
from cosched.training.precision import Precision
from cosched.training.shares import share_of
from losses.divergence import ForwardKL
from losses.reduction import decayed, weighted_mean
from tests.helpers.batches import make_batch
from tests.helpers.drafts import make_drafter


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    return make_batch(target, count=3, new=150)


def kl(decay: float = 0.8) -> ForwardKL:
    return ForwardKL(LossSettings(kind="forward_kl", position_decay=decay))


def test_forward_kl_is_zero_at_equality_and_matches_a_second_derivation() -> None:
    """KL(p, p) = 0; elsewhere it is cross-entropy minus entropy."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64, generator=generator)
    assert kl().rows(teacher, teacher).abs().max() < 1e-15
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = -(p * q.log()).sum(-1) + (p * p.log()).sum(-1)
    assert torch.allclose(kl().rows(student, teacher), expected, rtol=1e-12)


def test_forward_kl_gradient_equals_finite_differences() -> None:
    """In float64, through masks and decay, to gradcheck's tolerance of 1e-5."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=generator)
    weights = torch.ones(2, 3, 2, dtype=torch.float64)
    weights[0, 1] = 0
    assert torch.autograd.gradcheck(lambda s: kl()(s, teacher, weights), (student,))


def test_masked_rows_neither_count_nor_pass_a_gradient() -> None:
    """A row of weight zero may be infinite; the mean and the gradient do not see it."""
    loss = torch.tensor([1.0, math.inf, 3.0], requires_grad=True)
    mean = weighted_mean(loss, torch.tensor([1.0, 0.0, 1.0]))
    mean.backward()
    assert mean.item() == 2.0
    assert loss.grad is not None
    assert loss.grad.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_shares_of_a_batch_make_up_the_whole(
    target: Target, batch: SignalBatch, num_ranks: int
) -> None:
    """The mean over ranks of their weighted losses is the loss of the batch, and so is its gradient:
    also where the anchors do not divide, and where a rank has none."""
    batch = replace(
        batch,
        anchors_RN=batch.anchors_RN[:, :5],
        paths_RNK=batch.paths_RNK[:, :5],
        teacher_RNKX=batch.teacher_RNKX[:, :5],
        weights_RNK=batch.weights_RNK[:, :5],
    )
    drafter = make_drafter(target).clone(torch.float64)
    network = drafter.network().requires_grad_(True)
    module = BatchLoss(drafter, kl(), target.head, "hidden")

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, network.fc.weight)[0]

    whole = module(batch)
    shares = [share_of(batch, rank, num_ranks) for rank in range(num_ranks)]
    assert len({share.anchors_RN.shape for share, _ in shares}) == 1  # work of one size
    parts = torch.stack([weight * module(share) for share, weight in shares]).mean()
    # The teacher's head multiplies in float32, in other shapes.
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-4, atol=1e-9)


def test_position_decay_weighs_later_drafts_less() -> None:
    assert decayed(torch.ones(1, 1, 3), 0.5).flatten().tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("likeliest", [None, 1000])  # the second way, of all tokens there are
def test_a_loss_is_given_the_teacher_at_the_temperature_of_its_request(
    target: Target, batch: SignalBatch, likeliest: int | None
) -> None:
    """If it asks for it; a greedy request's teacher is certain, and other losses see it as it is."""
    cls = LOSSES.get("negative_log_target_only")
    settings = cls.Settings(kind="negative_log_target_only", vocab_top_k=likeliest)
    drafter = make_drafter(target).clone(torch.float32)
    temperatures = 0.7, 0.0, 1.0
    given = replace(batch, temperatures=temperatures)
    divided = torch.tensor([0.7, 1e-3, 1.0])[:, None, None, None]
    logits = target.head(batch.teacher_RNKX)
    for loss, by in ((cls(settings), divided), (kl(), torch.ones(()))):
        module = BatchLoss(drafter, loss, target.head, "hidden")
        module.begin_update(given)
        whole = loss(drafter.replay(batch), logits / by, batch.weights_RNK)
        torch.testing.assert_close(module(given), whole, rtol=1e-4, atol=1e-6)  # float32


def lacking(target: Target) -> tuple[Any, BatchLoss, Tensor]:
    """A draft with a third of the target's tokens, its loss, and which tokens it has."""
    drafter = make_drafter(target).clone(torch.float32)
    drafter.network().requires_grad_(True)
    ids = torch.arange(0, target.vocab_size, 3)
    drafter.target_ids = lambda: ids
    project = drafter.project
    drafter.project = lambda states: project(states)[..., : len(ids)]
    return drafter, BatchLoss(drafter, kl(), target.head, "hidden"), ids


@pytest.mark.parametrize("num_rows", [5, None])
def test_mass_outside_of_the_draft_vocabulary_is_lost_and_counted(
    target: Target, batch: SignalBatch, num_rows: int | None
) -> None:
    """Renormalised over the tokens that the draft has; what it lacks is a mean over rows that count.

    Over all of them where they are few, else over some from the first to the last.
    """
    assert make_trainer(target, make_drafter(target)).update(batch, Decision(1)).lost_mass is None
    _, module, ids = lacking(target)
    weights = batch.weights_RNK.clone()
    weights.view(-1)[weights.flatten().nonzero()[num_rows:]] = 0
    few = replace(batch, weights_RNK=weights if num_rows else batch.weights_RNK)
    p = target.head(few.teacher_RNKX).softmax(-1)[..., ids]
    torch.testing.assert_close(module.teacher_logits(few).softmax(-1), p / p.sum(-1, keepdim=True))
    module.begin_update(few)
    lost = 1 - p.sum(-1)[few.weights_RNK > 0]
    step = -(-len(lost) // ROWS_OF_LOST_MASS)
    assert (step == 1) == (num_rows is not None)
    torch.testing.assert_close(module.lost_mass, lost[step // 2 :: step].mean())


def test_the_target_s_head_is_not_put_to_tokens_that_the_draft_lacks(
    target: Target, batch: SignalBatch
) -> None:
    """All of its logits were made of every row of every micro-step, to keep those of some tokens.

    Loss and gradient are those of that way; the whole head is for the few rows of the lost mass.
    """
    drafter, module, ids = lacking(target)
    rows: list[int] = []
    hook = target.head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    module.begin_update(batch)
    value = module(batch)
    value.backward()
    module(batch)
    hook.remove()
    assert rows == [ROWS_OF_LOST_MASS]
    found = {name: p.grad.clone() for name, p in drafter.network().named_parameters()}
    drafter.network().zero_grad()
    teacher = target.head(batch.teacher_RNKX)[..., ids]
    expected = kl()(drafter.replay(batch), teacher, batch.weights_RNK)
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name, parameter in drafter.network().named_parameters():  # sums in another order
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_teacher_row_of_several_paths_is_recalled_once(
    target: Target, batch: SignalBatch
) -> None:
    """Paths of neighbouring anchors overlap: of K rows of an anchor all but one are the next one's."""
    rows_MX = batch.teacher_RNKX.flatten(0, 2)[batch.weights_RNK.flatten() > 0]
    rows_TX, says_M = distinct(rows_MX, "hidden")
    assert torch.equal(rows_TX[says_M], rows_MX)
    assert len(rows_TX) < len(rows_MX) / 2
    _, module, _ = lacking(target)
    recalled: list[int] = []
    logits = module._teacher.logits
    module._teacher.logits = lambda rows, ids: recalled.append(len(rows)) or logits(rows, ids)
    module(batch)
    assert recalled == [len(rows_TX)]


def test_bfloat16_products_change_an_update_by_their_rounding_only(
    target: Target, batch: SignalBatch
) -> None:
    """Loss and gradients of ``precision: bfloat16`` against float32's.

    A product rounds to 8 bits, 0.4 %; through a layer and a head that adds up to some per cent of
    the gradient's length, and to nothing that points elsewhere.
    """
    found: dict[str, tuple[float, Tensor]] = {}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        drafter = make_drafter(target)
        drafter.network().requires_grad_(True)
        module = BatchLoss(drafter, kl(), target.head, "hidden", precision=precision)
        loss = module(batch)
        loss.backward()
        gradients = [p.grad for p in module.network.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        found[precision] = loss.item(), torch.cat([g.flatten() for g in gradients])
    (loss, exact), (rounded_loss, rounded) = found.values()
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    assert not torch.equal(rounded, exact), "nothing was computed in bfloat16"
    assert torch.cosine_similarity(rounded, exact, 0) > 0.99


def test_replay_gradient_equals_finite_differences(target: Target, batch: SignalBatch) -> None:
    """Directional derivative of the whole loss in float64, relative error below 1e-6."""
    drafter = make_drafter(target).clone(torch.float64)
    network = drafter.network().requires_grad_(True)
    module = BatchLoss(drafter, kl(), target.head, "hidden")
    generator = torch.Generator().manual_seed(4)
    for name, parameter in network.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        network.zero_grad()
        module(batch).backward()
        assert parameter.grad is not None
        analytic = float((parameter.grad * direction).sum())
        step = 1e-5
        with torch.no_grad():
            parameter += step * direction
            above = float(module(batch))
            parameter -= 2 * step * direction
            below = float(module(batch))
            parameter += step * direction
        numeric = (above - below) / (2 * step)
        assert abs(analytic - numeric) < 1e-6 * max(1.0, abs(numeric)), name


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_a_loss_over_the_likeliest_tokens(target: Target, kind: str) -> None:
    """Over all of them it is the loss over the vocabulary, in value and gradient; over a few its
    gradient points the same way."""
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    drafter.network().requires_grad_(False)
    rounds = serve(target, drafter, make_requests(target, count=2, prompt=9, new=60), max_batch=2)
    batch = collected(target, drafter, "delayed", None, rounds)
    assert batch is not None
    network = drafter.network().requires_grad_(True)

    def step(most: int | None) -> tuple[Tensor, Tensor]:
        loss = ForwardKL(LossSettings(kind="forward_kl", vocab_top_k=most))
        module = BatchLoss(drafter, loss, target.head, "hidden")
        module.begin_update(batch)
        network.zero_grad()
        value = module(batch)
        value.backward()
        slopes = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return value.detach(), torch.cat(slopes)

    (whole, slope), (all_, all_slope), (few, few_slope) = map(step, (None, target.vocab_size, 1))
    torch.testing.assert_close(all_, whole)
    torch.testing.assert_close(all_slope, slope, rtol=1e-4, atol=1e-7)
    assert few != whole
    assert torch.cosine_similarity(few_slope, slope, dim=0) > 0.5
