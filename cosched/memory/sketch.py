"""A target and its drafter without weights, from their ``config.json`` files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cosched.errors import CheckpointError, ConfigError
from cosched.memory.targets import check_embedded, check_head
from cosched.registry import DRAFTERS
from cosched.settings.schema import own_keys
from cosched.settings.weights import header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosched.protocols import Drafter
    from cosched.settings.schema import Config

SAFETENSORS_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes of an element by the name that a safetensors header gives its type; one where not listed."""

MOST = 1 << 24  # tokens, width, layers: far more than any model has


@dataclass(slots=True)
class TargetSketch:
    """A ``TargetInfo`` of a ``config.json`` alone: embedding and head lie on the meta device."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_length: int
    model_type: str
    embedding: nn.Embedding
    head: nn.Module
    directory: Path
    cache_width: int
    tied: bool  # whether the head is the embedding
    raw: dict[str, Any]

    @classmethod
    def read(cls, path: str, dtype: torch.dtype) -> TargetSketch:
        """Read the folder of a target.

        Raises:
            CheckpointError: no ``config.json``, or it lacks a size.
        """
        directory = Path(path)
        try:
            raw = json.loads((directory / "config.json").read_text())
            json.dumps(raw, ensure_ascii=False).encode()  # half a character is none
            text: dict[str, Any] = raw.get("text_config", raw)
            vocab, hidden = int(text["vocab_size"]), int(text["hidden_size"])
            layers = int(text["num_hidden_layers"])
            longest = int(text.get("max_position_embeddings", 0))
            kind = str(raw.get("model_type", ""))
            heads = int(text["num_attention_heads"])
            head_dim = int(text.get("head_dim") or hidden // heads)
            cache_width = 2 * layers * int(text.get("num_key_value_heads") or heads) * head_dim
            tied = bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings")))
        except OSError as error:
            raise CheckpointError(
                f"target.path: no Hugging Face model folder at {directory}"
            ) from error
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{directory / 'config.json'} is damaged: {error}") from error
        except KeyError as error:
            raise CheckpointError(f"{directory / 'config.json'} has no {error}") from error
        for name, size in (
            ("vocab_size", vocab),
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
        ):
            if not 1 <= size <= MOST:
                raise CheckpointError(
                    f"{directory / 'config.json'}: {name} {size} (1 to {MOST} is allowed)"
                )
        with torch.device("meta"):
            embedding = nn.Embedding(vocab, hidden, dtype=dtype)
            head = nn.Linear(hidden, vocab, bias=False, dtype=dtype)
        embedding.requires_grad_(False)
        head.requires_grad_(False)
        return cls(
            vocab, hidden, layers, longest, kind, embedding, head, directory, cache_width, tied, raw
        )

    def token_ids(self) -> Mapping[str, int] | None:
        """The vocabulary of the folder's ``tokenizer.json``; None where it has none."""
        path = self.directory / "tokenizer.json"
        if not path.exists():
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def num_parameters(self) -> int | None:
        """Elements of the safetensors files, read from their headers; None where there are none."""
        files = self._files()
        return sum(n for path in files for _, n in _tensors(path).values()) if files else None

    def tensor_types(self) -> dict[str, str]:
        """Types of the safetensors files' tensors by name, as those files call them."""
        return {
            name: dtype for path in self._files() for name, (dtype, _) in _tensors(path).items()
        }

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


def _tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each tensor of a safetensors file."""
    try:
        return {
            name: (
                entry["dtype"],
                (entry["data_offsets"][1] - entry["data_offsets"][0])
                // SAFETENSORS_BYTES.get(entry["dtype"], 1),
            )
            for name, entry in header(path).items()
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def sketch(config: Config) -> tuple[TargetSketch, Drafter]:
    """The target and the drafter of an experiment, without weights.

    Raises:
        CheckpointError: a folder is missing or damaged, or the two do not fit.
        ConfigError: an answer is to be longer than the target's context.
    """
    target = TargetSketch.read(config.target.folder, getattr(torch, config.engine.dtype))
    workload, context = config.workload, target.max_length
    asked = workload.prompts is not None and config.engine.kind != "trace"
    if asked and 0 < context <= workload.max_new_tokens:
        raise ConfigError(
            f"workload.max_new_tokens: {workload.max_new_tokens} and a prompt do not fit into the "
            f"target's context of {context}; use less"
        )
    if config.engine.kind == "sglang":
        check_head(target.directory, target.tensor_types())
    else:
        check_embedded(target.directory, target.raw)
    return target, sketch_draft(config, target)


def sketch_draft(config: Config, target: TargetSketch) -> Drafter:
    """The drafter of these settings, without weights; errors as ``sketch``."""
    settings = config.drafter_settings
    with own_keys(config):
        drafter = DRAFTERS.get(settings.kind).sketch(settings, target)
    network = drafter.network()
    if network is not None:
        network.to(getattr(torch, config.engine.dtype))
    return drafter
