"""The proximal term: what it is, when it does nothing, and that it holds the student near.

Letters: M rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.records import Decision, SignalBatch
from cosched.registry import LOSSES
from cosched.settings.load import load_config
from cosched.testing.harness import make_trainer
from cosched.training.deepspeed_trainer import BETAS, DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from tests.helpers.batches import make_batch
from tests.helpers.drafts import make_drafter
from tests.helpers.losses import close, draw, few, gradient, some_rows
from tests.helpers.paths import QUICKSTART


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    return make_batch(target, count=2, new=60)


def proximal() -> Any:
    return LOSSES.get("proximal_kl")(LOSSES.get("proximal_kl").Settings(kind="proximal_kl"))


def held(weight: float) -> Any:
    """The forward KL with a proximal term of that weight."""
    terms = [{"kind": "forward_kl"}, {"kind": "proximal_kl", "weight": weight}]
    raw = {"kind": "sum", "terms": terms}
    return LOSSES.get("sum")(msgspec.convert(raw, LOSSES.get("sum").Settings))


# --- the loss ------------------------------------------------------------------------------


@few
@some_rows
def test_value_and_gradient_equal_a_second_derivation(seed: int, vocab: int, scale: float) -> None:
    """KL(r || q) from logits through log-sum-exp; its gradient is q - r; the teacher is not seen."""
    s, reference = draw(seed, vocab, scale)
    r, teacher = reference.softmax(-1), torch.full_like(s, math.nan)
    expected = (r * (reference - s)).sum(-1) - reference.logsumexp(-1) + s.logsumexp(-1)
    close(proximal().values(s, teacher, reference), expected)
    found = gradient(lambda s: proximal().values(s, teacher, reference), s)
    close(found, s.softmax(-1) - r)
    assert proximal().values(s, teacher, s).abs().max() < 1e-12


def test_gradient_equals_finite_differences() -> None:
    """Of the sum with the forward KL, in float64, to gradcheck's tolerance of 1e-5."""
    student, teacher = (rows.view(1, 2, 3, 7) for rows in draw(0, 7, 1.0))
    reference = draw(1, 7, 1.0)[0].view(1, 2, 3, 7)
    weights, leaf = torch.rand(1, 2, 3, dtype=torch.float64), student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: held(0.7)(s, teacher, weights, reference), (leaf,))


# --- what it does to an update -------------------------------------------------------------


def change(trainer: DeepSpeedTrainer, before: dict[str, Tensor]) -> float:
    """How far the weights have moved."""
    return float(sum((w - before[n]).square().sum() for n, w in trainer.weights().items()).sqrt())


@pytest.mark.parametrize("chunk_rows", [None, 50])
def test_one_step_is_as_without_it(
    target: Target, batch: SignalBatch, chunk_rows: int | None
) -> None:
    """The first micro-step of *every* update stands where the reference is: there it has no gradient.

    Adam divides by the gradient's own size, so a weight that has next to none may go either way: the
    comparison is of the whole step, whose difference is rounding (below 1e-3 of it). With the first
    update's reference instead of its own, the second one differs by far more.
    """
    with_it, without = (
        make_trainer(
            target, make_drafter(target), lr=1e-2, loss=held(weight), chunk_rows=chunk_rows
        )
        for weight in (20.0, 0.0)
    )
    start = {name: weight.clone() for name, weight in without.weights().items()}
    for _ in range(2):
        losses = [trainer.update(batch, Decision(1)).losses for trainer in (with_it, without)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        moved = change(without, start)
        apart = change(with_it, dict(without.weights()))
        assert apart < 1e-3 * moved
    assert without.batch_loss.before is None  # a term of weight zero is not paid for


@pytest.mark.parametrize("scope", ["full", "body"])
def test_several_steps_stay_nearer_to_the_start(
    target: Target, batch: SignalBatch, scope: str
) -> None:
    """The heavier the term, the nearer the student's rows stay to those before the update.

    Also where the head is trained, whose copy the reference needs.
    """
    drafter = make_drafter(target)
    log_r = drafter.replay(batch).log_softmax(-1)
    counts = batch.weights_RNK > 0
    distances = []
    for weight in (0.0, 1.0, 100.0):
        trainer = make_trainer(target, drafter, scope=scope, lr=1e-2, loss=held(weight))
        result = trainer.update(batch, Decision(8))
        assert result.num_skipped == 0
        updated = drafter.clone(torch.float32)
        updated.network().load_state_dict(trainer.weights(), strict=False)
        log_q = updated.replay(batch).detach().log_softmax(-1)
        distances.append(float((log_r.exp() * (log_r - log_q)).sum(-1)[counts].mean()))
    assert distances[0] > 1.2 * distances[1] > 2 * distances[2] > 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_steps_equal_plain_adamw_with_a_kept_copy(
    target: Target, batch: SignalBatch, zero_stage: int
) -> None:
    """Two updates of three chunked steps under DeepSpeed, head trained, against whole logits of a
    copy that was made before each update, with torch's AdamW: to 1e-3 of the change."""
    drafter = make_drafter(target)
    trainer = make_trainer(target, drafter, zero_stage, lr=1e-3, loss=held(2.0), chunk_rows=50)
    losses = [trainer.update(batch, Decision(3)).losses for _ in range(2)]
    student = drafter.clone(torch.float32)
    network = student.network().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.0)
    teacher = target.head(batch.teacher_RNKX)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for seen in losses:
        reference = student.clone(torch.float32).replay(batch).detach()
        expected = []
        for _ in range(3):
            loss = held(2.0)(student.replay(batch), teacher, batch.weights_RNK, reference)
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        assert seen == pytest.approx(expected, rel=1e-4)
    plain = {name: p.detach() for name, p in network.named_parameters()}
    assert change(trainer, plain) < 1e-3 * change(trainer, start)


def test_an_update_must_have_begun(target: Target, batch: SignalBatch) -> None:
    copy = make_drafter(target).clone(torch.float32)
    with pytest.raises(AssertionError, match="an update begins"):
        BatchLoss(copy, held(1.0), target.head, "hidden")(batch)


def test_what_is_frozen_is_shared_with_the_reference(target: Target, batch: SignalBatch) -> None:
    """Only what is trained is held twice."""
    trainer = make_trainer(target, make_drafter(target), scope="tail", loss=held(1.0))
    trainer.update(batch, Decision(1))
    loss = trainer.batch_loss
    behind = dict(loss.before.drafter.network().named_parameters())
    trained = trainer.weights()
    assert 0 < len(trained) < len(behind)
    for name, parameter in loss.network.named_parameters():
        assert (behind[name].data_ptr() == parameter.data_ptr()) == (name not in trained)


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{kind: proximal_kl}", r"adapt\.loss\.kind: 'proximal_kl' .*term of `sum`"),
        ("{kind: sum, terms: [{kind: proximal_kl}]}", r"adapt\.loss\.terms: none .*add one that"),
        (
            "{kind: sum, terms: [{kind: forward_kl, weight: 0}, {kind: proximal_kl}]}",
            r"adapt\.loss\.terms: none of those with a weight looks at the target",
        ),
        ("{kind: sum, terms: [{kind: forward_kl}, {kind: proximal_kl, weight: -1}]}", ">= 0"),
    ],
)
def test_what_teaches_nothing_is_refused(loss: str, message: str) -> None:
    """A draft that is only held where it is never moves."""
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [f"adapt.loss={loss}"])
