"""What every loss owes: a minimum where student and teacher agree, and gradients that are right.

Letters: R requests, N anchors, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosched.registry import LOSSES
from cosched.testing.registered import OneThread, registered

if TYPE_CHECKING:
    from cosched.protocols import Loss
    from cosched.registry import Plugin

SHAPE = (2, 3, 4, 7)


class LossContract(OneThread):
    """Every registered loss, or those in ``names``."""

    names: ClassVar[tuple[str, ...] | None] = None

    def settings(self, plugin: Plugin) -> list[Any]:
        """What to test a loss with; override it where a loss has settings worth more cells."""
        return [plugin.cls.Settings(kind=plugin.name)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases: list[Any] = []
        for plugin in registered(LOSSES, self.names):
            assert plugin.summary, f"{plugin.name} does not say what it is"
            cases += [
                pytest.param(plugin.cls(settings), id=f"{plugin.name}{number or ''}")
                for number, settings in enumerate(self.settings(plugin))
            ]
        metafunc.parametrize("loss", cases)

    def test_it_is_least_where_the_student_agrees(self, loss: Loss) -> None:
        """At q = p the gradient is zero, and no other student has a smaller loss.

        Its value there need not be zero: that of a cross-entropy is the teacher's entropy. A loss
        that is not ``proper`` owes this to a teacher that is certain of one token.
        """
        teacher, weights = logits(0), torch.ones(SHAPE[:-1], dtype=torch.float64)
        if not loss.proper:
            teacher = teacher + 60 * F.one_hot(teacher.argmax(-1), SHAPE[-1])
        least, gradient = value_and_gradient(loss, teacher, teacher, weights)
        assert float(gradient.abs().max()) < 1e-12
        for seed in range(1, 9):
            for scale in (1e-3, 1.0, 5.0):
                student = teacher + scale * logits(seed)
                assert float(evaluate(loss, student, teacher, weights)) >= float(least) - 1e-12
        far, gradient = value_and_gradient(loss, logits(1), teacher, weights)
        assert float(far) > float(least)  # a constant would pass all of the above
        assert float(gradient.abs().max()) > 1e-6

    def test_gradient_equals_finite_differences(self, loss: Loss) -> None:
        """In float64, through weights of all sizes, to gradcheck's tolerance of 1e-5."""
        if loss.detaches:
            pytest.skip("it holds factors fixed: its gradient is not that of its value")
        weights = torch.rand(SHAPE[:-1], dtype=torch.float64, generator=generator(3))
        weights[0, 1] = 0
        student = logits(1).requires_grad_()
        assert torch.autograd.gradcheck(lambda s: evaluate(loss, s, logits(0), weights), (student,))

    def test_rows_of_weight_zero_do_not_matter(self, loss: Loss) -> None:
        """Whatever stands in them: value and gradient of the other rows are the same."""
        weights = torch.ones(SHAPE[:-1], dtype=torch.float64)
        weights[0, 1] = weights[1, 2, 2:] = 0
        masked = weights == 0
        student, teacher = logits(1), logits(0)
        expected = value_and_gradient(loss, student, teacher, weights)
        assert not expected[1][masked].any()
        for seed, scale in ((5, 1.0), (6, 1e4)):
            other_student, other_teacher = student.clone(), teacher.clone()
            other_student[masked] = scale * logits(seed)[masked]
            other_teacher[masked] = scale * logits(seed + 10)[masked]
            found = value_and_gradient(loss, other_student, other_teacher, weights)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])

    def test_rows_that_count_matter(self, loss: Loss) -> None:
        """Every row with a weight has a gradient, so the masks above are not all that is seen."""
        weights = torch.ones(SHAPE[:-1], dtype=torch.float64)
        _, gradient = value_and_gradient(loss, logits(1), logits(0), weights)
        assert bool((gradient.abs().amax(-1) > 0).all())

    def test_a_constant_on_all_logits_changes_nothing(self, loss: Loss) -> None:
        """Logits are known up to a constant of each row, on both sides."""
        weights = torch.ones(SHAPE[:-1], dtype=torch.float64)
        constant = logits(8)[..., :1]
        expected = evaluate(loss, logits(1), logits(0), weights)
        assert torch.allclose(evaluate(loss, logits(1) + constant, logits(0), weights), expected)
        assert torch.allclose(evaluate(loss, logits(1), logits(0) + constant, weights), expected)

    @pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
    def test_it_stays_finite_at_extreme_logits(self, loss: Loss, scale: float) -> None:
        """In float32, certain of one token and certain of another: value and gradient are finite."""
        weights = torch.ones(SHAPE[:-1])
        student, teacher = (scale * logits(seed).float() for seed in (1, 0))
        for ours in (student, -teacher, teacher):
            value, gradient = value_and_gradient(loss, ours, teacher, weights)
            assert bool(value.isfinite())
            assert bool(gradient.isfinite().all())

    def test_rows_are_measured_one_by_one(self, loss: Loss) -> None:
        """Measured a few at a time and reduced, rows give the value and gradient of all at once."""
        weights = torch.rand(SHAPE[:-1], dtype=torch.float64, generator=generator(3))
        weights[0, 1] = 0
        expected = value_and_gradient(loss, logits(1), logits(0), weights)
        for chunk_rows in (1, 5):
            student = logits(1).requires_grad_()
            rows_M = torch.arange(student[..., 0].numel())
            at = (rows_M[:0], *rows_M.split(chunk_rows))  # no rows at all are as good as some
            parts = [[rows.flatten(0, 2)[few] for few in at] for rows in (student, logits(0))]
            measured_MQ = torch.cat(
                [
                    loss.measure(ours, theirs, theirs if loss.needs_reference else None)
                    for ours, theirs in zip(*parts, strict=True)
                ]
            )
            value = loss.reduce(measured_MQ.unflatten(0, SHAPE[:-1]), weights)
            assert torch.allclose(value, expected[0], rtol=1e-12)
            (gradient,) = torch.autograd.grad(value, student)
            assert torch.allclose(gradient, expected[1], rtol=1e-9, atol=1e-15)

    def test_it_looks_at_what_it_says_it_looks_at(self, loss: Loss) -> None:
        """At the reference only if it needs one, at the teacher unless it says otherwise."""
        weights = torch.ones(SHAPE[:-1], dtype=torch.float64)

        def value(teacher: Tensor, reference: Tensor | None) -> float:
            return float(loss(logits(1), teacher, weights, reference))

        reference = logits(2) if loss.needs_reference else None
        changed = value(logits(0), logits(3)) != value(logits(0), reference)
        assert changed == loss.needs_reference
        changed = value(logits(4), reference) != value(logits(0), reference)
        assert changed == loss.teaches

    def test_sizes_do_not_depend_on_values(self, loss: Loss) -> None:
        """It runs where there are none (`cosched check` adds up its memory so), forwards and back."""
        rows = [torch.empty(6, 5 * SHAPE[-1], device="meta") for _ in range(3)]
        student = rows[0].requires_grad_()
        measured_MQ = loss.measure(student, rows[1], rows[2] if loss.needs_reference else None)
        weights = torch.empty(1, 2, 3, device="meta")
        loss.reduce(measured_MQ.unflatten(0, (1, 2, 3)), weights).backward()
        assert student.grad is not None
        assert student.grad.shape == student.shape

    def test_it_is_pure(self, loss: Loss) -> None:
        """One number, the same every time, from inputs that stay as they are."""
        student, teacher = logits(1), logits(0)
        weights = torch.ones(SHAPE[:-1], dtype=torch.float64)
        kept = student.clone(), teacher.clone(), weights.clone()
        first, second = (evaluate(loss, student, teacher, weights) for _ in range(2))
        assert first.shape == ()
        assert torch.equal(first, second)
        assert all(map(torch.equal, kept, (student, teacher, weights)))


def evaluate(loss: Loss, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The loss, eagerly; where it asks for the draft before the update, that agrees with the teacher."""
    return loss(student, teacher, weights, teacher if loss.needs_reference else None)


def generator(seed: int) -> torch.Generator:
    """Seeded anew."""
    return torch.Generator().manual_seed(seed)


def logits(seed: int) -> Tensor:
    """Random float64 logits ``[R, N, K, V]``."""
    return 2 * torch.randn(SHAPE, dtype=torch.float64, generator=generator(seed))


def value_and_gradient(
    loss: Loss, student: Tensor, teacher: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the loss, with respect to the student's logits."""
    student = student.clone().requires_grad_()
    value = evaluate(loss, student, teacher, weights)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient
