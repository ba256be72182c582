"""The trainer's step, its state, and what is trained anew for each request."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cosched.engines.embedded.target import Target
from cosched.guard.scorer import AcceptanceScorer
from cosched.protocols import LossSettings
from cosched.records import Decision, SignalBatch, UpdateResult
from cosched.testing.harness import make_coscheduler, make_engine, make_requests, make_trainer
from cosched.training.background import BackgroundScorer, BackgroundTrainer
from cosched.training.deepspeed_trainer import BETAS, DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from losses.divergence import ForwardKL
from tests.helpers.batches import make_batch
from tests.helpers.drafts import make_drafter


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    return make_batch(target, count=3, new=150)


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


def test_scores_in_the_background_are_the_same(target: Target, batch: SignalBatch) -> None:
    """In the trainer's thread, behind its update; what is forgotten is never given, and what they raise
    is raised once."""
    drafter = make_drafter(target)
    trainer = make_trainer(target, drafter)
    scorer = AcceptanceScorer(trainer.batch_loss._drafter, target.head, "hidden", torch.float32)
    weights = {name: weight.clone() for name, weight in trainer.weights().items()}
    expected = scorer.scores(batch, [weights])
    behind = BackgroundTrainer(trainer, torch.device("cpu"))
    beside = BackgroundScorer(scorer, behind)

    def scores_of() -> list[list[float]]:
        while (found := beside.finished()) is None:
            assert beside.busy
            time.sleep(0.01)
        return found

    behind.update(batch, Decision(1))
    beside.scores(batch, [weights])
    beside.forget()
    assert not beside.busy
    beside.scores(batch, [weights])
    assert scores_of() == expected
    assert not beside.busy
    beside.scores(replace(batch, features_RCF=None), [weights])
    with pytest.raises(AssertionError, match="features"):
        scores_of()
    assert beside.finished() is None


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
    """In stage 0 DeepSpeed put all of them into one tensor, summed over one rank, and copied it back;
    their norm, which nobody else has a part of either, it summed likewise."""
    trainer = make_trainer(target, make_drafter(target), zero_stage=0)
    reduced: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: reduced.append(tensor.numel()))
    trainer.update(batch, Decision(2))
    assert not reduced


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
    network = trainer.batch_loss.network
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
