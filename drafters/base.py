"""What every drafter with a network does alike: read, fit, clone and write it."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from cosched.errors import CheckpointError
from cosched.protocols import CheckpointFormats, Choose, Drafter, TargetInfo
from cosched.records import Proposal, Scope, SignalSpec
from drafters import adapters
from drafters.cache import SlotCache
from drafters.checkpoint import Checkpoint, check_tensors, tokenizer_vocabulary
from drafters.config import DecoderConfig
from drafters.costs import layer_and_head
from drafters.layers import initialise
from drafters.vocabulary import (
    check_mapping,
    check_tokenizers,
    check_vocabularies,
    check_within,
    logits_of,
    partial_ids,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from cosched.records import Segment, SignalBatch
    from drafters.layers import Rotary

FINE_TUNED = 0.5
"""How far a table may have moved and still be the target's: trained apart, two differ by 1 and more."""

logger = logging.getLogger("cosched")

C = TypeVar("C", bound=DecoderConfig)
N = TypeVar("N", bound=nn.Module)


class NetworkDrafter(Drafter, Generic[C, N]):
    """A drafter whose network is read from a public checkpoint; serving and replay are the family's.

    A family gives ``formats``, ``conditioning``, ``draft_type``, ``Settings``, and the methods below
    that are empty here.
    """

    formats: ClassVar[CheckpointFormats]
    conditioning: ClassVar[Any]
    capturable: ClassVar[bool] = True
    borrowed: ClassVar[
        tuple[str, ...]
    ] = ()  # tensors that a file may have as copies of the target's

    def __init__(
        self,
        network: N,
        target: TargetInfo,
        num_draft_tokens: int,
        origin: Checkpoint[C] | None = None,
    ) -> None:
        self._network = network
        self._target = target
        self._config = cast("C", network.config)
        self._origin = origin
        self._runs: adapters.Runs | None = None
        self.num_draft_tokens = num_draft_tokens
        self._target_ids = partial_ids(getattr(network, "d2t", None), target.vocab_size)
        layers = self._config.layers_of(target.num_layers, target.model_type)
        self.signal = SignalSpec(feature_layers=layers, conditioning=self.conditioning)

    # --- what a family gives ---------------------------------------------------------------

    @classmethod
    @abstractmethod
    def make_network(cls, config: C, target_width: int, names: frozenset[str]) -> N:
        """The network for a target of that hidden size; ``names`` are the checkpoint's tensors."""

    @classmethod
    def select_tensors(
        cls, checkpoint: Checkpoint[C], target: TargetInfo, directory: Path
    ) -> dict[str, Tensor]:
        """The checkpoint's tensors that are the network's own, not copies of the target's."""
        del target, directory
        return dict(checkpoint.tensors)

    @abstractmethod
    def cache_writers(self) -> tuple[str, ...]:
        """Beginnings of parameter names that the keys and values of committed rows are made of."""

    @abstractmethod
    def replay_states(self, batch: SignalBatch) -> Tensor:
        """What ``project`` makes the rows of a batch of, with gradient ``[R, N, K, H]``."""

    @property
    @abstractmethod
    def spare_positions(self) -> int:
        """How many positions behind the last of a text ``propose`` may write."""

    def take_settings(self, settings: Any) -> None:
        """What the settings say of drafting, beside how many tokens."""

    # --- from and to files -----------------------------------------------------------------

    @classmethod
    def checkpoint(cls, settings: Any) -> Checkpoint[C]:
        """The checkpoint as it lies on disk, whole, whatever target it is for.

        Raises:
            CheckpointError: it is damaged, lacks a tensor or has one too many, or asks for what is
                not implemented.
        """
        directory = Path(settings.path)
        checkpoint = cls.formats.read(directory, settings)
        config, tensors = checkpoint.config, checkpoint.tensors
        with torch.device("meta"):
            network = cls.make_network(config, config.target_width, frozenset(tensors))
        expected = network.state_dict()
        own = {n: t for n, t in tensors.items() if n in expected or n not in cls.borrowed}
        check_tensors(expected, own, directory)
        if "d2t" in own:
            check_mapping(own["d2t"], own["t2d"], directory)
        return checkpoint

    @classmethod
    def load(cls, settings: Any, target: TargetInfo) -> Self:
        """Read a checkpoint folder.

        Raises:
            CheckpointError: it is damaged, or does not fit the target.
            ConfigError: the settings ask for what it cannot do.
        """
        directory = Path(settings.path)
        config, _, _ = cls.formats.read_shape(directory, settings)
        cls._check(config, settings, target)  # before any weight is read
        checkpoint = cls.checkpoint(settings)
        tensors = cls.select_tensors(checkpoint, target, directory)
        if "d2t" in tensors:
            check_within(tensors["d2t"], target.vocab_size, directory)
        with torch.device("meta"):  # no memory and no time for weights that are overwritten
            network = cls.make_network(config, target.hidden_size, frozenset(tensors))
        network.load_state_dict(tensors, assign=True)
        weight = target.embedding.weight
        network.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
        origin = Checkpoint(config, {}, checkpoint.format, checkpoint.raw)
        drafter = cls(network, target, settings.num_draft_tokens, origin)
        drafter.take_settings(settings)
        return drafter

    @classmethod
    def sketch(cls, settings: Any, target: TargetInfo) -> Self:
        """The drafter of a ``config.json`` alone, without weights, to see what it would take.

        Raises:
            CheckpointError: it does not fit the target.
            ConfigError: the settings ask for what it cannot do.
        """
        config, form, raw = cls.formats.read_shape(Path(settings.path), settings)
        cls._check(config, settings, target)
        with torch.device("meta"):
            network = cls.make_network(config, target.hidden_size, frozenset())
        origin = Checkpoint(config, {}, form, raw)
        drafter = cls(network, target, settings.num_draft_tokens, origin)
        drafter.take_settings(settings)
        return drafter

    @classmethod
    def _check(cls, config: C, settings: Any, target: TargetInfo) -> None:
        cls.check(config, settings, target)
        directory, drafted = Path(settings.path), getattr(config, "draft_vocab_size", None)
        check_vocabularies(config.vocab_size, drafted, target, directory)
        config.layers_of(target.num_layers, target.model_type)
        if (vocabulary := tokenizer_vocabulary(directory)) is not None:
            check_tokenizers(vocabulary, target.token_ids(), directory)

    @classmethod
    def check(cls, config: C, settings: Any, target: TargetInfo) -> None:
        """What a family has to say of a configuration before anything is built.

        Raises:
            CheckpointError: it does not fit the target.
            ConfigError: the settings ask for what it cannot do.
        """

    @classmethod
    def initialise(cls, config: C, target: TargetInfo, num_draft_tokens: int) -> Self:
        """A drafter with random weights, to be trained from scratch."""
        with torch.device(target.embedding.weight.device):
            network = cls.make_network(config, target.hidden_size, frozenset())
        initialise(network)
        return cls(network, target, num_draft_tokens)

    def save(self, directory: Path) -> None:
        form = self.formats.first_fit(self._config) if self._origin is None else self._origin.format
        raw = {} if self._origin is None else self._origin.raw
        tensors = dict(self._network.state_dict())
        self.formats.write(Checkpoint(self._config, tensors, form, raw), directory, form)

    def not_for_sglang(self) -> list[str]:
        names = frozenset(self._network.state_dict())
        return self.formats.not_for_sglang(self._config, names)

    def head(self, normed: Tensor, tokens_W: Tensor | None = None) -> Tensor:
        """Logits of the draft's own head, or of the target's, which may be in another type."""
        own = getattr(self._network, "lm_head", None)
        if own is not None:
            return logits_of(own, normed, tokens_W)
        return logits_of(
            self._target.head, normed.to(self._target.embedding.weight.dtype), tokens_W
        )

    # --- several adapters beside one another -----------------------------------------------

    def adapt(
        self, layers: Sequence[str], count: int, rank: int, scale: float
    ) -> Sequence[Mapping[str, tuple[Tensor, Tensor]]]:
        self._runs, served = adapters.adapt(self._network, layers, count, rank, scale)
        return served

    def use_adapter(self, state: SlotCache, slot: int, adapter: int) -> None:
        state.adapters[slot] = adapter

    def alone(self, adapter: int) -> Self:
        drafter = self.clone(self._weight.dtype)
        adapters.merge(drafter._network, adapter)
        return drafter

    def _next_rows(
        self, state: SlotCache, first_slot: int, num_slots: int, counts: list[int] | None = None
    ) -> None:
        """Say whose rows the network is given next: ``counts`` of each slot, or one of each."""
        if self._runs is not None:
            used = state.adapters[first_slot : first_slot + num_slots]
            self._runs.set(used, counts, self._weight)

    # --- what is the same in all, or in most -----------------------------------------------

    @property
    def state_width(self) -> int:
        return self._config.hidden_size

    def project(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self.head(states, tokens)

    @property
    def cache_bytes_per_token(self) -> int:
        config = self._config
        values = 2 * config.num_hidden_layers * config.kv_heads * config.width_of_head
        return values * self._weight.element_size()

    def cost(self, num_draft_tokens: int) -> float:
        """By weights that are multiplied: the network's and its head's, once a pass, over the target's."""
        target, own = self._target, dict(self._network.named_parameters())
        layer, head = layer_and_head(target)
        multiplied = sum(p.numel() for name, p in own.items() if "embed_tokens." not in name)
        if getattr(self._network, "lm_head", None) is None:
            multiplied += head
        passes = num_draft_tokens if self.conditioning == "chain" else 1
        return passes * multiplied / (target.num_layers * layer + head)

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> SlotCache:
        length = max_length + self.spare_positions
        cast("Rotary", self._network.rotary).reserve(length)
        return SlotCache.make(self._config, self._weight, max_batch, length, window)

    def observe(self, state: SlotCache, slot: int, segment: Segment) -> None:
        assert segment.features_RF is not None, "the engine must capture signal.feature_layers"
        state.add(slot, segment.tokens_R1[1:], segment.features_RF)

    @property
    def _weight(self) -> Tensor:
        """A weight of the network: all have its type and device, and so has what serving keeps."""
        return next(self._network.parameters())

    def move_slot(self, state: SlotCache, source: int, destination: int) -> None:
        state.move(source, destination)

    def network(self) -> N:
        return self._network

    def target_ids(self) -> Tensor | None:
        return self._target_ids

    def clone(self, dtype: torch.dtype) -> Self:
        network = copy.deepcopy(self._network).to(dtype)
        return type(self)(network, self._target, self.num_draft_tokens, self._origin)

    def scopes(self) -> Mapping[str, Scope]:
        """``full``, ``body`` (all but embedding and head), ``tail``: what no committed key is made of."""
        names = [name for name, _ in self._network.named_parameters()]
        body = (name for name in names if "lm_head." not in name and "embed_tokens." not in name)
        tail = (name for name in names if not name.startswith(self.cache_writers()))
        return {
            "full": Scope(tuple(names), keeps_cache=False),
            "body": Scope(tuple(body), keeps_cache=False),
            "tail": Scope(tuple(tail), keeps_cache=True),
        }


def check_fit(directory: Path, **sizes: tuple[int, int]) -> None:
    """Compare what the draft has with what the target has, by name.

    Raises:
        CheckpointError: they differ.
    """
    for key, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise CheckpointError(
                f"the draft {directory} has {key} {ours}, the target has {theirs}: "
                f"this draft was trained for another target"
            )


def picked(choose: Choose, logits_BKV: Tensor) -> Proposal:
    """What is drafted of logits that are there all at once."""
    tokens: list[Tensor] = []
    for k in range(logits_BKV.shape[1]):
        if (chosen := choose(k, logits_BKV[:, k])) is None:
            break
        tokens.append(chosen)
    return Proposal(torch.stack(tokens, 1), logits_BKV[:, : len(tokens)])


@cache
def note(text: str) -> None:
    """Tell who started this process, once, what is no mistake and good to know."""
    logger.warning("note: %s", text)


def is_targets_own(name: str, table: Tensor, theirs: Tensor, directory: Path) -> bool:
    """Whether a checkpoint's tensor is a copy of the target's, which is then used in its place.

    It is, up to the rounding of a 16-bit type, where the draft was made for this target; a target
    that was fine-tuned since has moved by some percent, and a note says so. Tables of two models
    that were trained apart are as far from each other as they are long.
    """
    if table.shape[1:] != theirs.shape[1:]:
        return False
    rows = min(len(table), len(theirs))  # the rest is padding
    ours, other = table[:rows].float(), theirs[:rows].detach().cpu().float()
    if torch.allclose(ours, other, rtol=0.02, atol=1e-3):
        return True
    apart = float((ours - other).norm() / other.norm().clamp(min=1e-12))
    if apart > FINE_TUNED:
        return False
    note(
        f"{name} of the draft {directory} differs from the target's by {apart:.2%} of its length, as "
        f"that of a base model does from a fine-tuned one's; the target's is used"
    )
    return True
