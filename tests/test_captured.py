"""Updates of fixed shapes: the loss and gradients of ragged ones, and the same operations every time.

What is captured on a GPU is done again here by doing it again, from the same places to the same places:
a graph does no less, and tests/test_gpu.py holds it to that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cosched.engines.embedded.target import Target
from cosched.errors import TrainingError
from cosched.records import Decision, Rows, SignalBatch
from cosched.registry import LOSSES
from cosched.testing.captured import by_doing
from cosched.testing.counting import Counting
from cosched.training.captured import Captured, placed
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from tests.helpers.captured import make_frames, ragged
from tests.helpers.chunks import (
    DRAFTERS_TO_TEST,
    LOSSES_TO_TEST,
    make_drafter,
    make_loss,
    small_target,
)

EXACT = 1e-12  # of the largest gradient, in float64: rows that fill up change the order of sums


def passes(module: BatchLoss, batch: SignalBatch) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of an update's first step."""
    module.begin_update(batch)
    loss = module(batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(module.network.parameters())))


def moved(drafter: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.network().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.05)


def assert_equal(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=EXACT, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    assert largest > 0
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT * largest)


@pytest.mark.parametrize(
    "rows",
    [
        "delayed",
        pytest.param("accepted", marks=pytest.mark.slow),
        pytest.param("all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("count", "nobody"), [(3, (3, 0, 0)), (4, (0, -1, -1))])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_a_filled_batch_has_the_loss_and_gradients_of_the_ragged_one(
    kind: str, example: str, count: int, nobody: tuple[int, ...], rows: Rows
) -> None:
    """In float64, of every family, whichever rows teach: three requests are filled up to four, and the
    anchors of four to those of three. A single row of what fills up would show if it weighed anything."""
    target = small_target()
    drafter = make_drafter(target, kind, example, torch.float64)
    batch = ragged(target, drafter, count, rows)
    filled = make_frames(rows).fill(batch)
    module = BatchLoss(drafter, make_loss("forward_kl"), target.head, "hidden")
    expected = passes(module, batch)
    assert_equal(passes(module, filled), expected)
    layout = filled.known
    assert layout is not None
    assert layout.weights_RNK[nobody] == 0
    filled.weights_RNK[nobody] = layout.weights_RNK[nobody] = 1
    with pytest.raises((AssertionError, ValueError)):  # it shows, or has no room
        assert_equal(passes(module, filled), expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.parametrize("loss", LOSSES_TO_TEST)
def test_every_loss_of_a_filled_batch_is_that_of_the_ragged_one(
    loss: str, chunk_rows: int | None
) -> None:
    """Also those that weigh rows against one another, ask for temperatures or compare with the draft
    before, and in chunks."""
    target = small_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float64)
    batch = replace(ragged(target, drafter, 3), temperatures=(0.7, 0.0, 1.3))
    own = {"acceptance_prefix": True, "hardest_share": 0.9, "easiest_share": 0.8}
    module = BatchLoss(
        drafter, make_loss(loss, **own), target.head, "hidden", chunk_rows=chunk_rows
    )
    found = []
    for one in (batch, make_frames().fill(batch)):
        drafter.network().load_state_dict(
            make_drafter(target, "eagle3", "plain", torch.float64).network().state_dict()
        )
        module.begin_update(one)
        moved(drafter)  # away from the draft before, so that what compares with it has a gradient
        value = module(one)
        slopes = torch.autograd.grad(value, list(module.network.parameters()))
        found.append((value.detach(), list(slopes)))
    assert_equal(found[1], found[0])


def test_every_registered_loss_is_tested() -> None:
    """The proximal one teaches nothing by itself; here it is a term of the sum."""
    assert {*LOSSES_TO_TEST, "proximal_kl"} == {plugin.name for plugin in LOSSES.plugins()}


# --- the same operations every time --------------------------------------------------------


class Operations(TorchDispatchMode):
    """Each operation with its numbers, and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.all.append(tree_map(_shape, (str(func), args, kwargs or {}, result)))
        return result


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value


def operations(module: BatchLoss, batch: SignalBatch, longest: int) -> list[Any]:
    """Of what a graph captures."""
    module.begin_update(batch)
    inputs = placed(module.begun, longest) if batch.known and batch.known.room else module.begun
    module.loss_of(inputs)  # tables are made
    with Operations() as found, Counting() as counting:
        loss = module.loss_of(inputs)
        torch.autograd.grad(loss, list(module.network.parameters()))
    assert not counting.waits
    return found.all


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES_TO_TEST)
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_updates_of_a_frame_are_the_same_operations(
    target: Target, kind: str, example: str, loss: str
) -> None:
    """To their numbers and strides, and the host asks nothing of the device: of three and of four
    requests, of other lengths and texts. Without frames they differ."""
    if loss != "forward_kl" and example != "plain":
        pytest.skip("losses see rows alone")
    drafter = make_drafter(target, kind, example, torch.float32)
    own = {"acceptance_prefix": True, "hardest_share": 0.9}
    module = BatchLoss(drafter, make_loss(loss, **own), target.head, "hidden")
    batches = [ragged(target, drafter, 3), ragged(target, drafter, 4, new=30, seed=4)]
    frames = make_frames()
    filled, others = (
        [operations(module, each, frames.longest) for each in some]
        for some in (map(frames.fill, batches), batches)
    )
    assert filled[0] == filled[1]
    assert others[0] != others[1]


def test_batches_of_few_shapes(target: Target) -> None:
    """One for each power of two of requests, whatever their lengths; rows that count are at most what a
    micro-step has, and at most twice as many anchors fill it up."""
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    frames = make_frames()
    assert frames.sizes == [4, 2, 1]
    shapes = set()
    for count in (1, 2, 3, 4):
        for new in (20, 50):
            batch = frames.fill(ragged(target, drafter, count, new=new))
            assert batch.known is not None
            assert batch.known.room is not None
            assert batch.known.room.rows == frames.anchors * drafter.num_draft_tokens
            assert batch.weights_RNK[..., 0].numel() < 2 * frames.anchors
            shapes.add((batch.weights_RNK.shape, batch.tokens_RC1.shape, batch.known.room))
    assert len(shapes) == 3


def test_what_fits_no_frame_stays_as_it_is(target: Target) -> None:
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch, frames = ragged(target, drafter, 4), make_frames()
    for smaller in ({"most_requests": 2}, {"window": 0}, {"longest": -1}, {"anchors": 8}):
        assert replace(frames, **smaller).fill(batch) is batch
    assert frames.fill(replace(batch, layout=None)).known is None


# --- through the trainer -------------------------------------------------------------------


def trainers(
    target: Target, drafter: Any, *losses: Any, record: Any = by_doing, must: bool = False
) -> tuple[DeepSpeedTrainer, DeepSpeedTrainer]:
    """One that has frames, and one that has not."""
    made = []
    for frames in (make_frames(), None):
        copy = drafter.clone(torch.float32)
        module = BatchLoss(copy, losses[0], target.head, "hidden", losses[1:])
        names = [name for name, _ in copy.network().named_parameters()]
        capture = partial(Captured, record=record, must=must)
        made.append(DeepSpeedTrainer(module, names, 0, 1e-3, 1.0, frames=frames, capture=capture))
    return made[0], made[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_captured_updates_are_eager_ones(target: Target, kind: str, example: str) -> None:
    """Losses and weights over updates of other requests, shapes and objectives, in float32: sums have
    another order. Each shape is recorded once, and each update has its own inputs."""
    drafter = make_drafter(target, kind, example, torch.float32)
    batches = [ragged(target, drafter, count, seed=count) for count in (3, 4, 1, 3)]
    captured, eager = trainers(target, drafter, make_loss("forward_kl"), make_loss("sum"))
    for number, batch in enumerate(batches):
        decision = Decision(3, objective=number % 2)
        found, expected = captured.update(batch, decision), eager.update(batch, decision)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert (found.num_rows, found.num_skipped) == (expected.num_rows, 0)
        assert found.lost_mass == (expected.lost_mass and pytest.approx(expected.lost_mass))
    for name, weight in captured.weights().items():
        torch.testing.assert_close(weight, eager.weights()[name], rtol=1e-3, atol=1e-4)
    assert captured._captured is not None
    assert len(captured._captured._passes) == 3  # of four requests twice, of one once


def test_a_captured_step_that_is_not_finite_is_skipped(target: Target) -> None:
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    captured, _ = trainers(target, drafter, make_loss("forward_kl"))
    batch = ragged(target, drafter, 3)
    captured.update(batch, Decision(1))
    before = {name: weight.clone() for name, weight in captured.weights().items()}
    teacher = batch.teacher_RNKX * torch.nan
    layout = batch.layout
    assert layout is not None
    of = batch.starts_R, batch.weights_RNK, teacher
    bad = replace(batch, teacher_RNKX=teacher, layout=replace(layout, of=of))
    assert captured.update(bad, Decision(2)).num_skipped == 2
    assert all(torch.equal(before[name], w) for name, w in captured.weights().items())
    assert captured.update(batch, Decision(1)).num_skipped == 0


def test_what_cannot_be_captured_is_left_to_the_eager_form(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """And told, once a shape; who must have it is told why there is none."""

    def refuse(do: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = ragged(target, drafter, 3)
    captured, eager = trainers(target, drafter, make_loss("forward_kl"), record=refuse)
    for _ in range(2):
        found, expected = captured.update(batch, Decision(2)), eager.update(batch, Decision(2))
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert [record.message for record in caplog.records if "not permitted" in record.message]
    assert caplog.text.count("not permitted") == 1
    captured, _ = trainers(target, drafter, make_loss("forward_kl"), record=refuse, must=True)
    with pytest.raises(TrainingError, match=r"cuda_graph: always, but .*not permitted"):
        captured.update(batch, Decision(1))


def test_a_captured_update_waits_once(target: Target) -> None:
    """As the eager one does; what it is filled up with is uploaded without a wait."""
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    captured, _ = trainers(target, drafter, make_loss("forward_kl"))
    batch = ragged(target, drafter, 3)
    captured.update(batch, Decision(1))
    with Counting() as counting:
        captured.update(batch, Decision(3))
    assert dict(counting.waits) == {"tolist": 1}
