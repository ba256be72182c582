"""The passes of a micro-step as CUDA graphs: the host hands over one thing in place of thousands.

A graph repeats what it was captured with, on the same addresses, so each shape of inputs has a place of
its own that they are copied to. What is captured is the loss and the way back from it; to clip and to
step, some ten operations for all parameters together, stays with the trainer and DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cosched.errors import TrainingError
from cosched.loop.copies import Copies
from cosched.loop.tensors import with_tensors
from cosched.records import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cosched.training.micro_step import BatchLoss, Prepared

SAME = 1e-2  # of loss and gradient: what is wrong is far off, and bfloat16 adds up in any order

Do = Callable[[], list[Tensor]]
Record = Callable[[Do], tuple[Callable[[], None], list[Tensor]]]
"""``record(do)``: what does the same again on the same addresses, and the results as they lie there."""

logger = logging.getLogger("cosched")


class Captured:
    """Loss and gradients of a ``BatchLoss``, recorded for each shape of its inputs as it first comes.

    ``trained`` are the parameters that have gradients, ``longest`` where texts of a batch begin at most.
    What cannot be recorded is told, and left to the eager form unless it ``must`` be.

    Raises:
        TrainingError: it must be, and cannot; at ``passes``.
    """

    def __init__(
        self,
        batch_loss: BatchLoss,
        trained: Sequence[Tensor],
        longest: int,
        record: Record | None = None,
        must: bool = False,
    ) -> None:
        self._batch_loss = batch_loss
        self._trained = trained
        self._longest = longest
        self._record = record or Graphs(trained[0].device).record
        self._must = must
        self._passes: dict[Any, Passes | None] = {}

    def passes(self, prepared: Prepared, objective: int) -> Passes | None:
        """Those of an update, good until the next one; None where it fills no frame."""
        known = prepared.batch.known
        if known is None or known.room is None:
            return None
        key = (objective, *((one.shape, one.dtype) for one in tensors_of(prepared)))
        if key not in self._passes:
            self._passes[key] = self._recorded(prepared)
        found = self._passes[key]
        if found is not None:
            found.take(prepared)
        return found

    def _recorded(self, prepared: Prepared) -> Passes | None:
        inputs = placed(prepared, self._longest)
        try:
            return Passes(self._batch_loss, inputs, self._trained, self._record)
        except RuntimeError as error:  # the eager form does the same, only slower
            if self._must:
                raise TrainingError(
                    f"adapt.trainer.cuda_graph: always, but updates cannot be captured: {error}; use auto"
                ) from error
            logger.warning("note: updates are not captured in CUDA graphs: %s", error)
            return None


class Passes:
    """Forward and back with inputs of one shape, as they lie in ``inputs``.

    Raises:
        RuntimeError: they cannot be recorded.
    """

    def __init__(
        self, batch_loss: BatchLoss, inputs: Prepared, trained: Sequence[Tensor], record: Record
    ) -> None:
        self._batch_loss = batch_loss
        self._inputs = inputs
        self._trained = trained
        self._reached: list[Tensor] = []  # parameters that the loss depends on
        self._again, (self._loss, *self._gradients) = record(self._do)

    def take(self, prepared: Prepared) -> None:
        """Copy the inputs of an update to where they are read."""
        copies = Copies()
        for place, tensor in zip(tensors_of(self._inputs), tensors_of(prepared), strict=True):
            copies.add(place, tensor)
        copies.make()

    def __call__(self) -> Tensor:
        """The loss with the weights as they are now, whose gradients the parameters have then."""
        self._again()
        for parameter, gradient in zip(self._reached, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _do(self) -> list[Tensor]:
        with torch.enable_grad():
            loss = self._batch_loss.loss_of(self._inputs)
            found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        found = cast("Sequence[Tensor | None]", found)
        pairs = [(p, g) for p, g in zip(self._trained, found, strict=True) if g is not None]
        self._reached = [parameter for parameter, _ in pairs]
        return [loss.detach(), *(gradient.contiguous() for _, gradient in pairs)]


class Graphs:
    """Records CUDA graphs that have one memory: who repeats one is done with the results of another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, do: Do) -> tuple[Callable[[], None], list[Tensor]]:
        """A first time for what is made once, tables and workspaces, which is not the graph's.

        Other threads may go on using the device meanwhile.

        Raises:
            RuntimeError: it cannot be captured, or what was captured does something else.
        """
        here, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):  # it is left also where a capture ends badly
            first = _figures(do())
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                results = do()
            graph.replay()
            found = _figures(results)
        here.wait_stream(self._stream)
        if not torch.allclose(found, first, rtol=SAME, equal_nan=True):  # host waits for the device
            raise RuntimeError("what was captured does not repeat what it was captured from")
        loss, *gradients = results
        return graph.replay, [loss, *map(_borrowed, gradients)]


def _figures(results: Sequence[Tensor]) -> Tensor:
    """The loss, and the norm of all gradients ``[2]``."""
    loss, *gradients = results
    return torch.stack((loss, get_total_norm(gradients)))


class _Memory:
    """What lies at a tensor's address, in the protocol by which libraries share arrays on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<f{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(result: Tensor) -> Tensor:
    """The same memory, which the next graph that is captured may have as well.

    Gradients are as large as the weights, and each graph would have some of its own for ever.
    """
    return torch.as_tensor(_Memory(result), device=result.device)


def placed(prepared: Prepared, longest: int) -> Prepared:
    """A copy of it to be read again and again, with texts that begin there as far as the host knows.

    Tables of positions are made by that, as long as they may ever have to be.
    """
    copy = with_tensors(prepared, torch.clone)
    batch, layout = copy.batch, copy.batch.layout
    assert layout is not None
    of = batch.starts_R, batch.weights_RNK, batch.teacher_RNKX
    layout = replace(layout, starts=(longest,) * len(layout.starts), of=of)
    return replace(copy, batch=replace(batch, layout=layout))


def tensors_of(record: Any) -> Iterator[Tensor]:
    """All that a record has, and those that records in it have."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif _has_tensors(value):
            yield from tensors_of(value)


def _has_tensors(value: Any) -> bool:
    """Whether it is a record with inputs of its own; a layout only says whose it is."""
    return is_dataclass(value) and not isinstance(value, Layout)
