"""The target inside SGLang, seen without SGLang: that it is not written to, and the rows that are watched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker import adapted, taps
from cosched.engines.sglang.worker.target import ServedTarget
from cosched.errors import ConfigError, PublicationError
from cosched.loop.publish import InPlacePublisher, Serving


class Model(nn.Module):
    """A target as SGLang holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.logits_processor = LogitsProcessor()

    def get_embed_and_head(self) -> Any:
        return self.embedding.weight, self.embedding.weight


class LogitsProcessor(nn.Module):
    final_logit_softcapping = None
    logit_scale = None

    def forward(self, input_ids: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    group = SimpleNamespace(world_size=1)
    monkeypatch.setitem(vars(compat), "get_tp_group", lambda: group)
    monkeypatch.setitem(vars(compat), "LogitsProcessor", LogitsProcessor)
    return Model()


def test_a_write_to_the_target_is_seen(model: Model) -> None:
    """The count of writes was asked of ``.data``, which has one of its own: it could never rise."""
    config = SimpleNamespace(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, context_len=16, hf_config=object()
    )
    target = ServedTarget(SimpleNamespace(model_config=config, model=model), None)
    draft = {"weight": torch.zeros(3)}
    publisher = InPlacePublisher(
        Serving(draft, target.tensors()), {"weight": torch.zeros(3)}, target_check_every=0
    )
    publisher.publish({"weight": torch.ones(3)})
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.raises(PublicationError, match="a tensor of the target was written to"):
        publisher.publish({"weight": torch.full((3,), 2.0)})
    assert draft["weight"].tolist() == [1.0] * 3


class OnGpu:
    """Says that it is on a GPU, and makes its tensors where we are."""

    is_cuda = True
    shape = (8, 4)

    def new_empty(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape)


def test_a_graph_of_more_rows_than_are_watched_is_not_captured(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replay would leave the buffer as it was, and a padded batch be taught with another's rows."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    tap = taps.HiddenTap(model, 4, OnGpu())  # type: ignore[arg-type]
    long, short = torch.ones(6, 4), torch.full((3, 4), 2.0)
    model.logits_processor(None, long)  # a prompt: never from a graph
    assert torch.equal(tap.rows(6), long)
    capturing[0] = True
    model.logits_processor(None, short)
    assert torch.equal(tap.rows(3), short)
    with pytest.raises(ConfigError, match=r"^engine\.max_batch: a CUDA graph of 6 rows"):
        model.logits_processor(None, long)


@pytest.mark.parametrize(
    ("running", "each", "rows"), [(16, 5, 4096), (1000, 5, 5120), (1024, 17, 17408), (1, 4, 4096)]
)
def test_as_many_rows_are_watched_as_requests_may_run(running: int, each: int, rows: int) -> None:
    """4096 whatever ``engine.max_batch`` was; batches are rounded up for a graph."""
    assert adapted.graph_rows(running, each) == rows
