"""Losses, gradients, and the trainer's step."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.loop.teacher_rows import Teacher
from cosched.protocols import LossSettings
from cosched.records import Decision, SignalBatch, UpdateResult
from cosched.testing.harness import (
    Every,
    collected,
    make_coscheduler,
    make_engine,
    make_requests,
    make_trainer,
    serve,
)
from cosched.training.background import BackgroundTrainer
from cosched.training.deepspeed_trainer import BETAS, DeepSpeedTrainer
from cosched.training.micro_step import ROWS_OF_LOST_MASS, BatchLoss, share_of
from cosched.training.precision import Precision
from losses.divergence import ForwardKL
from losses.reduction import decayed, weighted_mean
from tests.helpers.drafts import make_drafter


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    drafter, requests = make_drafter(target), make_requests(target, count=3, prompt=9, new=150)
    rounds = serve(target, drafter, requests, max_batch=3)
    sample = collected(target, drafter, "delayed", None, rounds)
    assert sample is not None
    return sample


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


def test_a_trainer_in_the_background_trains_the_same(target: Target, batch: SignalBatch) -> None:
    """One update at a time; what follows waits for it, and what it raises is raised once."""

    def trainer() -> DeepSpeedTrainer:
        return make_trainer(target, make_drafter(target))

    def result_of(trainer: BackgroundTrainer) -> UpdateResult:
        while (result := trainer.finished()) is None:
            time.sleep(0.01)
        return result

    inline, behind = trainer(), BackgroundTrainer(trainer(), torch.device("cpu"))
    expected = inline.update(batch, Decision(3))
    assert behind.update(batch, Decision(3)) is None
    assert behind.busy
    assert result_of(behind).losses == expected.losses
    assert not behind.busy
    for name, weight in behind.weights().items():
        assert torch.equal(weight, inline.weights()[name])
    behind.update(batch, Decision(1))
    behind.load(inline.weights())  # waits, and lets the update go
    assert not behind.busy
    assert torch.equal(behind.weights()["fc.weight"], inline.weights()["fc.weight"])
    behind.update(replace(batch, features_RCF=None), Decision(1))
    with pytest.raises(AssertionError, match="features"):
        result_of(behind)
    assert not behind.busy


def test_position_decay_weighs_later_drafts_less() -> None:
    assert decayed(torch.ones(1, 1, 3), 0.5).flatten().tolist() == [1.0, 0.5, 0.25]


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
    teacher = Teacher("hidden", target.head)
    rows_MX = batch.teacher_RNKX.flatten(0, 2)[batch.weights_RNK.flatten() > 0]
    rows_TX, says_M = teacher.distinct(rows_MX)
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


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_step_equals_plain_adamw(
    target: Target, batch: SignalBatch, zero_stage: int
) -> None:
    """Eight clipped steps agree with torch's AdamW to 2e-6 of the largest change.

    The arithmetic is the same; only the order of the sum in the gradient norm differs.
    """
    drafter = make_drafter(target)
    trainer = make_trainer(target, drafter, zero_stage, lr=1e-3, max_norm=0.5)
    losses = trainer.update(batch, Decision(8)).losses

    copy = drafter.clone(torch.float32)
    network = copy.network().requires_grad_(True)
    module = BatchLoss(copy, ForwardKL(LossSettings(kind="forward_kl")), target.head, "hidden")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.0)
    expected = []
    for _ in range(8):
        loss = module(batch)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    before = {n: p.detach() for n, p in drafter.network().named_parameters()}
    plain = {n: p.detach() for n, p in network.named_parameters()}
    moved = max(float((plain[n] - before[n]).abs().max()) for n in plain)
    apart = max(float((plain[n] - w).abs().max()) for n, w in trainer.weights().items())
    assert apart < 2e-6 + 1e-3 * moved


def test_one_rank_reduces_no_gradients(
    target: Target, batch: SignalBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In stage 0 DeepSpeed put all of them into one tensor, summed over one rank, and copied it back."""
    trainer = make_trainer(target, make_drafter(target), zero_stage=0)
    reduced: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: reduced.append(tensor.numel()))
    trainer.update(batch, Decision(2))
    assert all(number == 1 for number in reduced)  # a norm


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_non_finite_steps_are_skipped_and_counted(
    target: Target, batch: SignalBatch, zero_stage: int
) -> None:
    """A NaN loss, or a finite loss with an infinite gradient, moves nothing and is counted."""
    trainer = make_trainer(target, make_drafter(target), zero_stage)
    trainer.update(batch, Decision(1))
    before = {name: weight.clone() for name, weight in trainer.weights().items()}
    bad = replace(batch, teacher_RNKX=batch.teacher_RNKX * math.nan)
    result = trainer.update(bad, Decision(2))
    assert (result.num_steps, result.num_skipped) == (2, 2)
    network = trainer._batch_loss.network
    handle = network.fc.weight.register_hook(lambda g: g * math.inf)
    result = trainer.update(batch, Decision(1))
    handle.remove()
    assert math.isfinite(result.losses[0])
    assert result.num_skipped == 1
    assert all(torch.equal(before[n], w) for n, w in trainer.weights().items())
    assert trainer.update(batch, Decision(1)).num_skipped == 0  # and it goes on


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_reset_is_exact(target: Target, batch: SignalBatch, zero_stage: int) -> None:
    """After a reset the same batch gives the same losses and weights, to the bit."""
    trainer = make_trainer(target, make_drafter(target), zero_stage)
    first = trainer.update(batch, Decision(4))
    after = {name: weight.clone() for name, weight in trainer.weights().items()}
    trainer.reset()
    second = trainer.update(batch, Decision(4))
    assert first.losses == second.losses
    assert all(torch.equal(after[n], w) for n, w in trainer.weights().items())


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_restored_trainer_goes_on_exactly(
    target: Target, batch: SignalBatch, zero_stage: int
) -> None:
    """Three steps, kept, and three more in a new trainer are six steps, to the bit."""
    drafter = make_drafter(target)
    whole, first, second = (make_trainer(target, drafter, zero_stage) for _ in range(3))
    expected = whole.update(batch, Decision(6)).losses
    first.update(batch, Decision(3))
    second.update(batch, Decision(1))  # what is restored must replace this
    second.restore(first.state())
    assert second.update(batch, Decision(3)).losses == expected[3:]
    assert all(torch.equal(whole.weights()[n], w) for n, w in second.weights().items())


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_state_is_the_same_whatever_order_it_was_read_in(
    target: Target, batch: SignalBatch, zero_stage: int
) -> None:
    """A file has its tensors by name, the tenth before the second. Moments that changed places are of
    another size than their weights, and AdamW's fused step writes beyond the smaller ones."""
    drafter = make_drafter(target)
    first, second = (make_trainer(target, drafter, zero_stage) for _ in range(2))
    first.update(batch, Decision(2))
    kept = first.state()
    second.restore(dict(sorted(kept.items())))
    again = second.state()
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_per_request_state_starts_from_the_loaded_draft(target: Target) -> None:
    """With state per request, the second request is served as if it were the first."""
    requests = make_requests(target, count=2, prompt=8, new=150)
    runs = {}
    for order in (requests, requests[1:]):
        drafter = make_drafter(target)
        observer = make_coscheduler(target, drafter, every=8, lr=3e-3, reset=True)
        engine = make_engine(target, drafter, order, observer=observer)
        runs[len(order)] = {f.request.id: f.rounds for f in engine.generate(order)}
        assert observer.counters.updates > 5
    accepted = [[row.num_accepted for row in runs[n]["r1"]] for n in (2, 1)]
    assert accepted[0] == accepted[1]


def test_scope_body_leaves_the_head_alone(target: Target, batch: SignalBatch) -> None:
    drafter = make_drafter(target)
    assert set(drafter.scopes()["full"].parameters) - set(drafter.scopes()["body"].parameters) == {
        "lm_head.weight"
    }


def test_every_waits_for_its_rounds() -> None:
    from schedulers.fixed import EveryNRounds, EveryNRoundsSettings
    from tests.helpers.rounds import snapshot

    policy = EveryNRounds(
        EveryNRoundsSettings(kind="every_n_rounds", rounds=5, num_steps=2, idle_steps=3)
    )

    def steps(rounds_since_update: int, num_running: int = 1) -> int:
        seen = snapshot(rounds_since_update=rounds_since_update, num_running=num_running)
        return policy.decide(seen).num_steps

    assert [steps(n) for n in (0, 4, 5, 9)] == [0, 0, 2, 2]
    assert [steps(n, num_running=0) for n in (0, 1, 9)] == [0, 3, 3]  # once, when all is done
    assert Every(5).decide(snapshot(rounds_since_update=5)).num_steps == 1
