"""Of a target what training needs: sizes, embedding and head, without what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from cosched.engines.embedded.target import Target
from cosched.errors import CheckpointError
from cosched.memory.sketch import TargetSketch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosched.protocols import TargetInfo
    from cosched.settings.schema import Config

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight",)


@dataclass(slots=True)
class Tables:
    """A ``TargetInfo`` that can be sent to another process, and that keeps no layers alive."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_length: int
    model_type: str
    embedding: nn.Embedding
    head: nn.Module
    tokens: Mapping[str, int] | None

    def token_ids(self) -> Mapping[str, int] | None:
        return self.tokens


def tables_of(target: TargetInfo) -> Tables:
    """Those of a target that is loaded."""
    sizes = target.vocab_size, target.hidden_size, target.num_layers, target.max_length
    tables = target.model_type, target.embedding, target.head
    return Tables(*sizes, *tables, target.token_ids())


def read_tables(config: Config, device: torch.device) -> Tables:
    """Those of the target in ``target.path``, as the engine of this configuration has them.

    SGLang's are read out of their files. What transformers makes of a target, which may scale an embedding,
    it makes here as well, in the host's memory, and all but the tables is let go.

    Raises:
        CheckpointError: they are not where they usually are.
    """
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    if config.engine.kind != "sglang":
        whole = Target.load(config.target.folder, torch.device("cpu"), dtype)
        whole.require_plain_head()
        tables = tables_of(whole)
    else:
        found = TargetSketch.read(config.target.folder, dtype)
        embedding = _read(found, EMBEDDINGS, dtype)
        head = embedding if found.tied else _read(found, HEADS, dtype)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(head, requires_grad=False)
        found.embedding = nn.Embedding.from_pretrained(embedding, freeze=True)
        found.head = linear
        tables = tables_of(found)
    tables.embedding.to(device)
    tables.head.to(device)
    return tables


def _read(target: TargetSketch, endings: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
    """The one tensor whose name ends so ``[V, H]``."""
    for path in sorted(Path(target.directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                if name.endswith(endings):
                    table = file.get_tensor(name)
                    if table.shape[1:] == (target.hidden_size,):
                        return table[: target.vocab_size].to(dtype)
    raise CheckpointError(
        f"target.path: no tensor of {target.directory} is called {' or '.join(endings)}, so a side-car "
        f"finds no table there; use adapt.placement: colocated"
    )
