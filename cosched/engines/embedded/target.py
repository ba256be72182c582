"""The target: a Hugging Face causal LM, with the hidden states that drafting and teaching need.

Letters: B requests, T rows, P prompt rows, F fused feature width, H hidden width, V vocabulary,
L visible positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from cosched.engines.embedded import attention
from cosched.engines.embedded.kv_cache import SlotCache
from cosched.engines.embedded.ragged import Ragged, packed_as
from cosched.engines.embedded.trees import visible_in_trees
from cosched.errors import CheckpointError, ConfigError
from cosched.loop.checksum import checksum
from cosched.memory.targets import window_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence


@dataclass(frozen=True, slots=True)
class TargetRows:
    """What one forward pass of the target gives for rows ``[B, T]``."""

    logits_BTV: Tensor
    hidden_BTH: Tensor
    features_BTF: Tensor | None

    def first(self, number: int) -> TargetRows:
        """The first rows of each request."""
        return self.each(lambda rows_BTX: rows_BTX[:, :number])

    def each(self, change: Callable[[Tensor], Tensor]) -> TargetRows:
        """The same done to all that is known of the rows."""
        features = self.features_BTF
        return TargetRows(
            change(self.logits_BTV),
            change(self.hidden_BTH),
            None if features is None else change(features),
        )


class Target:
    """A causal LM in evaluation mode, its embedding and head, and a forward over a SlotCache."""

    def __init__(self, model: Any, path: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_length: int = config.max_position_embeddings
        self.model_type: str = config.model_type
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.head: nn.Module = model.get_output_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.dtype: torch.dtype = self.embedding.weight.dtype
        self._capture_layers: tuple[int, ...] = ()
        self._captured: dict[int, Tensor] = {}
        self._hidden: Tensor | None = None
        self._parts: dict[tuple[int, ...], nn.ModuleList] = {}  # some of its layers
        self.path = path
        self.window = window_of(config)
        self._token_ids: dict[str, int] | None = None
        decoder = model.get_decoder()
        decoder.register_forward_hook(self._keep_hidden)
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_hook(self._keep_features(index))

    @classmethod
    def load(cls, path: str, device: torch.device, dtype: torch.dtype) -> Target:
        """Load a folder in Hugging Face format; nothing is downloaded.

        Raises:
            CheckpointError: no such folder, or none that transformers can load.
        """
        if not (Path(path) / "config.json").is_file():
            raise CheckpointError(f"target.path: no Hugging Face model folder at {path}")
        transformers_logging.disable_progress_bar()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, attn_implementation=attention.NAME
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"target.path: {path} cannot be loaded: {error}") from error
        return cls(model.to(device), path)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model of a folder, loaded when first asked for.

        Raises:
            CheckpointError: the folder has none.
        """
        assert self.path is not None
        return load_tokenizer(self.path)

    def token_ids(self) -> dict[str, int] | None:
        """The vocabulary of the tokenizer beside the model; None for a model without a folder."""
        if self.path is None:
            return None
        if self._token_ids is None:
            self._token_ids = dict(self.tokenizer.get_vocab())
        return self._token_ids

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids at which the model means to stop."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.model.config.eos_token_id
        return _as_set(ids)

    def checksum(self) -> str:
        """Checksum of every weight."""
        return checksum(dict(self.model.state_dict()))

    @torch.no_grad()
    def require_plain_head(self) -> None:
        """Make sure that logits are the head of the last hidden state and nothing more.

        Raises:
            ConfigError: the model scales or caps its logits after the head.
        """
        ids_1T = torch.arange(4, device=self.device)[None] % self.vocab_size
        cache = self.new_cache(1, 4)
        rows = self.forward(ids_1T, torch.arange(4, device=self.device)[None], cache)
        if not torch.allclose(
            rows.logits_BTV, self.head(rows.hidden_BTH).float(), rtol=1e-3, atol=1e-3
        ):
            raise ConfigError(
                "adapt.replay.teacher: this target changes its logits after the head (scaling or "
                "soft capping), so they cannot be recomputed from hidden states; use logits"
            )

    def new_cache(self, max_batch: int, max_length: int) -> SlotCache:
        return SlotCache(self.num_layers, max_batch, max_length, self.device)

    @torch.no_grad()
    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        cache: SlotCache,
        feature_layers: tuple[int, ...] = (),
        first_slot: int = 0,
        num_logits: int | None = None,
        round_to: int = 1,
        counts: Sequence[int] | None = None,
        sees_BTT: Tensor | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> TargetRows:
        """Run rows at ``positions_BT`` over what the cache holds before them.

        ``num_logits`` limits the logits to the last rows (a prompt needs one). ``round_to`` makes the
        number of positions that attention goes over, most of the last ones masked, a multiple of it.
        Of request b only the first ``counts[b]`` rows are computed, and the rest are zeros; None: all.
        ``sees_BTT`` says which of the rows each one sees, if they are trees (``trees.Forest``). Of the model
        only those of its ``layers`` are run, and the norm and head behind them; None: all.
        """
        ragged = None if counts is None else Ragged(counts, ids_BT.shape[1], ids_BT.device)
        if sees_BTT is not None:
            assert round_to == 1
            mask_BTL, places_BT = visible_in_trees(positions_BT, sees_BTT, self.window)
            cache.place(places_BT, mask_BTL.shape[-1], first_slot, ragged)
        else:
            visible = int(positions_BT.max()) + 1  # host waits for the device
            visible += -visible % round_to
            cache.place(positions_BT, visible, first_slot, ragged)
            at_L = torch.arange(visible, device=ids_BT.device)
            mask_BTL = at_L <= positions_BT[..., None]
            if self.window is not None:
                mask_BTL &= at_L > positions_BT[..., None] - self.window
        with self._capturing(feature_layers), packed_as(ragged), self._only(layers):
            output = self.model(
                input_ids=ids_BT if ragged is None else ragged.pack(ids_BT),
                position_ids=positions_BT if ragged is None else ragged.pack(positions_BT),
                attention_mask=mask_BTL[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=num_logits or 0,
            )
            hidden = self._hidden
            assert hidden is not None
            self._captured[self.num_layers] = hidden
            features = [self._captured[layer] for layer in feature_layers]
        rows = TargetRows(
            logits_BTV=output.logits.float(),
            hidden_BTH=hidden,
            features_BTF=torch.cat(features, -1) if features else None,
        )
        return rows if ragged is None else rows.each(ragged.spread)

    @contextmanager
    def _capturing(self, feature_layers: tuple[int, ...]) -> Generator[None]:
        self._capture_layers = feature_layers
        try:
            yield
        finally:
            self._capture_layers = ()
            self._captured.clear()
            self._hidden = None

    @contextmanager
    def _only(self, layers: tuple[int, ...] | None) -> Generator[None]:
        """The model without its other layers; each keeps its own number, and so its place in the cache."""
        if layers is None:
            yield
            return
        decoder = self.model.get_decoder()
        whole = decoder.layers
        if layers not in self._parts:
            self._parts[layers] = nn.ModuleList([whole[layer] for layer in layers])
        decoder.layers = self._parts[layers]
        try:
            yield
        finally:
            decoder.layers = whole

    def _keep_hidden(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def _keep_features(self, index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if index in self._capture_layers:
                self._captured[index] = output[0] if isinstance(output, tuple) else output

        return hook


def load_tokenizer(path: str) -> Any:
    """The target's tokenizer.

    Raises:
        CheckpointError: the folder has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"target.path: no tokenizer in {path}: {error}") from error
    # Of a folder without one, transformers makes one that has special tokens alone.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise CheckpointError(
            f"target.path: no tokenizer in {path}: put the model's tokenizer.json and "
            f"tokenizer_config.json beside its weights"
        )
    return tokenizer


def load_end_tokens(path: str) -> frozenset[int]:
    """``Target.end_tokens`` of a folder, without its model.

    Raises:
        CheckpointError: its ``config.json`` cannot be read.
    """
    try:
        generation = GenerationConfig.from_pretrained(path, local_files_only=True)
        ids = generation.eos_token_id
    except OSError:  # it has none
        ids = None
    try:
        if ids is None:
            ids = AutoConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except (OSError, ValueError) as error:
        raise CheckpointError(f"target.path: {path} cannot be loaded: {error}") from error
    return _as_set(ids)


def _as_set(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset([ids] if isinstance(ids, int) else ids or ())
