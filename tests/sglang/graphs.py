"""PARD's pass through SGLang's runner of CUDA graphs, on a CPU: a plugin of SGLang's for tests.

All of the runner is its own: what it captures and for which batches, its buffers, how a batch is padded
and laid into them, what attention is told, what is cut off the output. In the place of a CUDA graph
stands the captured function, which is called again. Each replay writes a line to the file that
``COSCHED_TEST_GRAPHS`` names: rows of batch that were captured, of the batch itself, and the largest
difference of its logits from those of the eager pass over the same batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SIZES = [2, 4]


class Called:
    """What SGLang takes for a way to capture: it keeps functions, and calls them."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner.model_runner
        self._captured: dict[Any, Callable[[], Any]] = {}
        self._log = Path(os.environ["COSCHED_TEST_GRAPHS"])

    def capture_session(self, stream: Any) -> Any:
        return nullcontext()

    def capture_one(self, key: Any, forward: Callable[[], Any], **_: Any) -> None:
        forward()
        self._captured[key] = forward

    def replay_session(self) -> Any:
        return nullcontext()

    def replay(self, key: Any, batch: Any) -> Any:
        output = self._captured[key]()
        rows = output.next_token_logits[: len(batch.input_ids)].clone()
        self._runner._prepare_eager_forward_batch(batch)
        eager = self._runner.eager_runner.execute(batch).next_token_logits
        apart = (rows - eager).abs().max().item()
        with self._log.open("a") as log:
            log.write(f"{key.size} {batch.batch_size} {apart}\n")
        output.next_token_logits[: len(rows)] = rows  # SGLang's eager pass may write there too
        return output


def install() -> None:
    """Stand in for what is CUDA's own, in this process."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as module

    from cosched.engines.sglang import compat
    from cosched.engines.sglang.cpu.attention import NativeBackend

    def replan(self: Any, batch: Any, in_capture: bool = False) -> None:
        self.init_forward_metadata(batch)

    @contextmanager
    def no_stream(stream: Any) -> Iterator[Any]:
        yield SimpleNamespace(stream=stream)

    def capture(runner: Any, runner_class: Callable[[], type]) -> None:
        vocabulary = runner.model_config.vocab_size
        runner.graph_shared_output = SimpleNamespace(
            get_logits_buffer=lambda size, rows: torch.zeros(rows, vocabulary)
        )
        runner.decode_cuda_graph_runner = runner_class()(runner)

    NativeBackend.init_cuda_graph_state = lambda *_: None
    NativeBackend.get_cuda_graph_seq_len_fill_value = lambda _: 1
    NativeBackend.init_forward_metadata_out_graph = replan
    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
    module.get_batch_sizes_to_capture = lambda *_, **__: (SIZES, [])
    module.get_or_create_global_graph_capture_stream = lambda: None
    module.graph_capture = no_stream
    module.resolve_decode_backend = Called
    module.maybe_flashinfer_autotune_speculative_draft = lambda *_, **__: None
    streams = (
        "_record_in_graph_metadata_prep_done", "_publish_read_done", "_forks_draft_metadata_prep",
    )  # fmt: skip
    for name in streams:  # a CPU has none
        setattr(module.DecodeCudaGraphRunner, name, lambda *_, **__: None)
    compat.capture_passes = capture
