"""What makes an update smaller: gradients accumulated over groups of requests, an optimizer in the host's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.memory import footprint as counting
from cosched.memory.footprint import check_fits, footprint
from cosched.memory.sketch import sketch
from cosched.records import Decision, SignalBatch
from cosched.settings.load import load_config
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.shares import Share, accumulate, shares_of
from tests.helpers.batches import make_batch
from tests.helpers.drafts import make_drafter
from tests.helpers.losses import make_loss

SAMPLED = Path("configs/sampled.yaml")
RATE = 1e-3


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    return make_batch(target, count=3, new=150)


def learnt(
    target: Target,
    batch: SignalBatch,
    parts: int,
    stage: int = 0,
    loss: str = "forward_kl",
    offload: bool = False,
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Losses of two updates of two steps, the weights behind them and before."""
    copy = make_drafter(target).clone(torch.float32)
    names = [name for name, _ in copy.network().named_parameters()]
    module = BatchLoss(copy, make_loss(loss), target.head, "hidden")
    trainer = DeepSpeedTrainer(
        module, names, stage, RATE, 1.0, accumulation_steps=parts, offload=offload
    )
    before = torch.cat([w.flatten() for w in trainer.weights().values()]).clone()
    losses: list[float] = []
    for _ in range(2):
        result = trainer.update(batch, Decision(2))
        assert result.num_skipped == 0
        assert result.num_rows == batch.num_rows
        losses += result.losses
    return losses, torch.cat([w.flatten() for w in trainer.weights().values()]), before


@pytest.mark.parametrize(("parts", "stage"), [(2, 0), (3, 0), (1000, 0), (3, 1), (2, 2)])
def test_steps_over_parts_are_those_over_the_whole(
    target: Target, batch: SignalBatch, parts: int, stage: int
) -> None:
    """Also where the three requests do not divide, and where there are more parts than requests."""
    losses, weights, before = learnt(target, batch, parts, stage)
    whole, expected, _ = learnt(target, batch, 1, stage)
    assert losses == pytest.approx(whole, rel=1e-4)
    moved = (expected - before).abs().mean()
    assert moved > RATE  # four steps
    assert (weights - expected).abs().mean() < 0.01 * moved


def test_a_loss_that_compares_with_the_draft_before_does_so_in_each_part(
    target: Target, batch: SignalBatch
) -> None:
    """The draft before the update, not before the part."""
    losses, *_ = learnt(target, batch, 3, loss="proximal_kl")
    whole, *_ = learnt(target, batch, 1, loss="proximal_kl")
    assert losses == pytest.approx(whole, rel=0.02, abs=1e-5)
    assert whole[-1] > 1e-4


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("is_known", [True, False])
def test_groups_of_all_ranks_make_up_the_whole(
    target: Target, batch: SignalBatch, num_ranks: int, is_known: bool
) -> None:
    """The mean over ranks is the loss of the batch, whether the host knows its weights or asks for them."""
    if not is_known:
        batch = replace(batch, layout=None)
    copy = make_drafter(target).clone(torch.float64)
    copy.network().requires_grad_(True)
    trained = dict(copy.network().named_parameters())
    module = BatchLoss(copy, make_loss("forward_kl"), target.head, "hidden")
    found = [
        accumulate(module, shares_of(batch, 2, rank, num_ranks), trained)
        for rank in range(num_ranks)
    ]
    whole, gradients = accumulate(module, [Share(batch)], trained)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), whole)
    for name, gradient in gradients.items():
        parts = torch.stack([own[name] for _, own in found]).mean(0)
        torch.testing.assert_close(parts, gradient, rtol=1e-3, atol=1e-7)  # the head's float32


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_check_counts_one_part_at_a_time(kind: str) -> None:
    def step(parts: int) -> int:
        config = load_config(
            SAMPLED,
            ["arms=[adapted]", f"drafter.kind={kind}", f"drafter.path=tinyworld/{kind}",
             "adapt.replay.anchors=64", "engine.max_batch=8",
             f"adapt.trainer.gradient_accumulation_steps={parts}"],
        )  # fmt: skip
        return footprint(config, *sketch(config)).step

    assert step(8) < 0.6 * step(1)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_offloaded_optimizer_takes_the_same_steps(
    target: Target, batch: SignalBatch, stage: int
) -> None:
    """To the bit where both are on a CPU; a GPU's are in tests/test_gpu.py."""
    found, expected = (
        learnt(target, batch, 1, stage, offload=offload) for offload in (True, False)
    )
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


OFFLOADS = "adapt.trainer.offload_optimizer=true"


def test_check_counts_no_optimizer_that_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of moments and masters the weights that ZeRO lays out flat are left."""
    monkeypatch.setattr(counting, "device_of", lambda _name: torch.device("cuda"))

    def counted(*own: str) -> tuple[int, int]:
        config = load_config(SAMPLED, ["arms=[adapted]", "adapt.trainer.zero_stage=auto", *own])
        said = footprint(config, *sketch(config))
        return said.masters // said.num_trained, said.moments // said.num_trained

    assert counted() == (0, 8)
    assert counted("adapt.trainer.zero_stage=1") == (8, 8)
    assert counted(OFFLOADS) == (4, 0)


def test_what_cannot_be_offloaded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"zero_stage: it is ZeRO .*, got 0; use auto"):
        load_config(SAMPLED, [OFFLOADS, "adapt.trainer.zero_stage=0"])
    config = load_config(SAMPLED, [OFFLOADS, "adapt.trainer.zero_stage=auto", "arms=[adapted]"])
    with pytest.raises(ConfigError, match="offload_optimizer: true, but what trains is on the CPU"):
        check_fits(config, *sketch(config))
