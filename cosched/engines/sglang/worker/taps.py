"""What the target's last layer said, from inside SGLang's forward pass.

Letters: T rows of a forward pass, H hidden width.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cosched.engines.sglang import compat
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Seconds = Callable[[], tuple[float, float]]


class HiddenTap:
    """The target's hidden states behind its final norm, from which its head gives the logits.

    They are taken on the way into SGLang's logits processor: before penalties, grammar and
    sampling, which change the logits in place. On a GPU they are copied to ``max_rows`` rows of a
    fixed buffer; the copy is part of a captured CUDA graph and so runs when it is replayed. More
    rows than that never come from a graph, and are kept as they are: to capture one of more is refused.
    """

    def __init__(self, model: nn.Module, max_rows: int, like: Tensor) -> None:
        processors = [m for m in model.modules() if isinstance(m, compat.LogitsProcessor)]
        if len(processors) != 1:
            raise ConfigError(
                f"target.path: SGLang's {type(model).__name__} has {len(processors)} logits "
                f"processors; cosched taps models that have one"
            )
        processor: Any = processors[0]
        if processor.final_logit_softcapping or processor.logit_scale not in {None, 1.0}:
            raise ConfigError(
                "target.path: this target changes its logits after the head (scaling or soft "
                "capping), so a teacher cannot be recomputed from its hidden states"
            )
        self._buffer = like.new_empty(max_rows, like.shape[-1]) if like.is_cuda else None
        self._hidden: Tensor | None = None
        processor.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        if self._buffer is not None and len(hidden) <= len(self._buffer):
            self._buffer[: len(hidden)].copy_(hidden)
            self._hidden = self._buffer
        elif self._buffer is not None and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                f"engine.max_batch: a CUDA graph of {len(hidden)} rows is captured, and cosched watches "
                f"{len(self._buffer)}; raise engine.max_batch, or lower --cuda-graph-max-bs"
            )
        else:
            self._hidden = hidden

    def rows(self, number: int) -> Tensor:
        """The first rows of the newest forward pass, ``[number, H]``; the next overwrites them."""
        # A replayed graph runs no Python: what it wrote is in the buffer, whatever came before.
        fits = self._buffer is not None and number <= len(self._buffer)
        hidden = self._buffer if fits else self._hidden
        assert hidden is not None, "the target has not run"
        return hidden[:number]


def owned(tensor: Tensor) -> Tensor:
    """The tensor in storage that no later forward pass writes to (CUDA graphs have fixed ones)."""
    return tensor.clone() if tensor.is_cuda else tensor


class Stopwatch:
    """Time between marks: of the device where it runs by itself, else of the host."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"

    def mark(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, *marks: Any) -> Seconds:
        """Seconds from the first mark to the second and from there to the third, when asked."""
        first, second, third = marks
        if not self._events:
            return lambda: (second - first, third - second)
        # The host has read the counts of this round by then: the events are done.
        return lambda: (first.elapsed_time(second) / 1e3, second.elapsed_time(third) / 1e3)
