"""What an update, a score, a publication and a round ask of a device, counted without one.

A limit here is what was reached, not what would do: whoever needs more raises it and says why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.engines.sglang.worker.collector import RoundCollector, Verified
from cosched.guard.scorer import AcceptanceScorer
from cosched.loop import checksum
from cosched.loop.publish import InPlacePublisher
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.protocols import LossSettings
from cosched.records import Decision
from cosched.registry import DRAFTERS
from cosched.testing.counting import Counting
from cosched.testing.harness import make_buffer, make_requests, make_trainer, serve
from losses.divergence import ForwardKL
from tests.helpers.drafts import make_drafter
from tests.helpers.verified import WIDTH, K, prompt

TAKEN_BY_A_WORKER = 7  # the tap's copy, and of each of four tensors one; two are cast as well


def filled(target: Target, drafter: Any, count: int) -> ReplayBuffer:
    """A buffer with so many running requests of unequal length."""
    buffer = make_buffer(target, drafter, "delayed", None)
    requests = make_requests(target, count=count, prompt=9, new=40)
    for round_ in serve(target, drafter, requests, max_batch=count):
        if round_.finished:
            break
        buffer.collect(round_)
    return buffer


def weights_of(drafter: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in drafter.network().named_parameters()}


def test_what_counts() -> None:
    """Operators that compute are launches, views and memory are none; numbers, sizes, copies are waits."""
    x = torch.arange(12.0).view(3, 4)
    with Counting() as counting:
        y = (x.view(4, 3).t() + 1).sum()
        torch.empty(3)
    assert dict(counting.launches) == {"add": 1, "sum": 1}
    assert not counting.waits
    asks = {
        "float": lambda: float(y),
        "bool": lambda: bool((x > 0).any()),
        "nonzero": lambda: x.nonzero(),
        "unique": lambda: x.unique(),
        "mask": lambda: x[x > 3],
        "list": lambda: x[[0, 2]],
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "tensor": lambda: torch.tensor([1, 2]),
        "repeat": lambda: x.repeat_interleave(torch.ones(3, dtype=torch.int64), 0),
    }
    for name, ask in asks.items():
        with Counting() as counting:
            ask()
        assert counting.num_waits >= 1, name
    with Counting() as counting:
        x[x > 3] = 0
        x.where(x > 0, 1.0)
    assert not counting.waits


def test_backward_passes_count_too() -> None:
    x = torch.ones(3, requires_grad=True)
    with Counting() as forward:
        y = (x * x).sum()
    with Counting() as backward:
        y.backward()
    assert forward.launches["mul"] == 1
    assert backward.launches["mul"] == 2


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_an_update_waits_once(target: Target, kind: str, num_steps: int) -> None:
    """For its losses, at its end, however many steps; to draw the batch takes no wait. It were four
    waits and three uploads a step."""
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    drafter.network().requires_grad_(False)
    buffer = filled(target, drafter, 4)
    trainer = make_trainer(target, drafter, zero_stage=0)
    batch = buffer.sample()
    assert batch is not None
    trainer.update(batch, Decision(1))  # tables grow, and moments are made
    with Counting() as drawing:
        batch = buffer.sample()
    assert batch is not None
    assert not drawing.waits
    with Counting() as counting:
        result = trainer.update(batch, Decision(num_steps))
    assert dict(counting.waits) == {"tolist": 1}
    assert len(result.losses) == num_steps


def test_a_loss_over_the_likeliest_tokens_waits_once_more(target: Target) -> None:
    """How many tokens these are is known to the device only; all steps of an update share them."""
    drafter = make_drafter(target)
    buffer = filled(target, drafter, 2)
    loss = ForwardKL(LossSettings(kind="forward_kl", vocab_top_k=5))
    trainer = make_trainer(target, drafter, zero_stage=0, loss=loss)
    batch = buffer.sample()
    assert batch is not None
    trainer.update(batch, Decision(1))
    with Counting() as counting:
        trainer.update(batch, Decision(3))
    assert counting.num_waits == 2


@pytest.mark.parametrize("temperatures", [None, (0.7, 0.0, 1.0, 1.3)])
def test_scores_wait_once_and_cost_the_same_for_any_number_of_requests(
    target: Target, temperatures: tuple[float, ...] | None
) -> None:
    """All requests are one batch. It was a pass and two waits for each of them and each candidate."""
    drafter = make_drafter(target)
    weights = weights_of(drafter)
    copy = drafter.clone(torch.float32)
    scorer = AcceptanceScorer(copy, target.head, "hidden", torch.bfloat16)
    launches: dict[tuple[int, int], int] = {}
    for count in (4, 16):
        held_out = filled(target, drafter, count).held_out(64)
        assert held_out is not None
        given = temperatures and temperatures * (count // 4)
        held_out = replace(held_out, temperatures=given)
        assert len(held_out.lengths_R) == count
        scorer.scores(held_out, [weights])
        for candidates in (1, 3):
            with Counting() as counting:
                scorer.scores(held_out, [weights] * candidates)
            assert dict(counting.waits) == {"tolist": 1}
            launches[count, candidates] = counting.num_launches
    assert launches[4, 1] == launches[16, 1]
    assert launches[4, 3] == launches[16, 3] < 3 * launches[4, 1]


@pytest.mark.parametrize("target_check_every", [0, 1])
def test_a_publication_waits_once(
    target: Target, monkeypatch: pytest.MonkeyPatch, target_check_every: int
) -> None:
    """For the checksums of the candidate, of what serves, and of the target where that is due. It
    was a wait for each tensor of each of them."""
    drafter = make_drafter(target)
    network = drafter.network()
    publisher = InPlacePublisher.of_modules(network, target.model, target_check_every)
    # The host folds rows by itself where it can; where weights lie on a device it cannot.
    monkeypatch.setattr(checksum, "_folds", lambda bits: torch.hash_tensor(bits, dim=-1))
    new = {name: p + 0.5 for name, p in weights_of(drafter).items()}
    with Counting() as counting:
        publisher.publish(new)
    assert dict(counting.waits) == {"numpy": 1}
    assert counting.launches["_foreach_copy_"] == 2  # to serve, and to be kept


@pytest.mark.parametrize("count", [1, 4, 32])
def test_a_round_takes_as_many_launches_with_any_batch(count: int) -> None:
    """Twelve with what a worker has taken off the verification, and no wait. It was five for each
    request."""
    collector = RoundCollector()
    limits = ReplayLimits(
        window=64,
        anchors=32,
        path=K,
        max_tokens=1 << 20,
        max_bytes=1 << 28,
        feature_row_bytes=4 * WIDTH,
        teacher_row_bytes=4 * WIDTH,
    )
    buffer = ReplayBuffer(limits, "delayed", None)
    names = tuple(f"r{i}" for i in range(count))
    collector.prefilled(tuple(replace(prompt(n, 0, 4, 4), rows=None) for n in names))
    for turn in range(3):
        tokens = 4 + turn * (K + 1) + torch.arange(K + 1).repeat(count, 1)
        collector.verified(
            Verified(
                iteration=turn,
                request_ids=names,
                version=0,
                tokens_BS=tokens,
                decided_BS=tokens + 1,
                features_BSF=torch.randn(count, K + 1, WIDTH),
                teacher_BSX=torch.randn(count, K + 1, WIDTH),
                seconds=lambda: (0.0, 0.0),
            )
        )
        with Counting() as counting:
            for round_ in collector.counted([K] * count):
                buffer.collect(round_)
    assert not counting.waits
    assert counting.num_launches + TAKEN_BY_A_WORKER <= 12
