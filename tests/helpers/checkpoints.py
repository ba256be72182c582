"""Example checkpoints of the three families: written, changed, read, and refused."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.errors import CheckpointError, ConfigError
from cosched.registry import DRAFTERS
from drafters.checkpoint import Checkpoint

FAMILIES = ("eagle3", "dflash", "pard")


def example(target: Target, kind: str, name: str) -> Any:
    """An example with every tensor random, in bfloat16 as published, its vocabulary map valid."""
    torch.manual_seed(5)
    drafter = DRAFTERS.get(kind).examples(target, 3)[name]
    network = drafter.network().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    if getattr(network, "lm_head", None) is not None and hasattr(network, "d2t"):
        ids = torch.randperm(target.vocab_size)[: len(network.d2t)].sort().values
        network.d2t.copy_(ids - torch.arange(len(ids)))
        network.t2d.zero_()
        network.t2d[ids] = True
    return drafter


def save(target: Target, kind: str, name: str, directory: Path, form: str | None = None) -> None:
    drafter = example(target, kind, name)
    cls = DRAFTERS.get(kind)
    network = drafter.network()
    tensors = dict(network.state_dict())
    form = form or cls.formats.FORMATS[0]
    cls.formats.write(Checkpoint(network.config, tensors, form), directory, form)


def read(kind: str, directory: Path, **settings: Any) -> Checkpoint:
    cls = DRAFTERS.get(kind)
    return cls.checkpoint(cls.Settings(kind=kind, path=str(directory), **settings))


def load(kind: str, directory: Path, target: Target, **settings: Any) -> Any:
    cls = DRAFTERS.get(kind)
    return cls.load(cls.Settings(kind=kind, path=str(directory), **settings), target)


def with_tokens(target: Target, number: int) -> Target:
    """The target with a tokenizer of that many tokens, to load a draft for."""
    other = copy(target)
    other.token_ids = lambda: {str(i): i for i in range(number)}
    return other


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, types and every bit."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def change(directory: Path, **keys: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def refused(call: Any, *words: str) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
