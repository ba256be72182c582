"""Chunks of logits: what they make of updates and scores is what all rows at once make, and once.

Letters: R requests, N anchors, K drafted tokens, M rows, V vocabulary, H state width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosched.records import Acceptance, SignalBatch
from cosched.testing.harness import make_target
from cosched.training.micro_step import BatchLoss
from tests.helpers.chunks import (
    DRAFTERS_TO_TEST,
    LOSSES_TO_TEST,
    make_batch,
    make_drafter,
    make_loss,
    make_scorer,
    small_target,
    two_of,
)


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
    plain = make_loss(loss, **own)
    reference = before if plain.needs_reference else None
    teacher = modules[0].teacher_logits(batch)
    if plain.at_temperature:
        assert batch.temperatures is not None
        teacher /= torch.tensor(batch.temperatures)[:, None, None, None]
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
