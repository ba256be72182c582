"""DFlash as a drafter.

The context is seen through keys and values made of the target's features alone, so a committed row
is one projection per layer. A block is the anchor and K masks; its rows see each other both ways,
row k predicts the token k places behind the anchor.

Letters: B slots, R rows, C context rows, N anchors, K drafted tokens, S = K + 1 rows of a block,
F fused feature width, E model width, V draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from cosched.errors import CheckpointError, ConfigError
from cosched.records import SglangWorker, SignalBatch
from cosched.registry import DRAFTERS
from drafters.attention import attend_cache, attend_packed
from drafters.base import NetworkDrafter, check_fit, is_targets_own, picked
from drafters.config import small_layer
from drafters.dflash import formats
from drafters.dflash.config import DFlashConfig
from drafters.dflash.network import DFlashNetwork
from drafters.vocabulary import over_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosched.protocols import Choose, DrafterSettings, TargetInfo
    from cosched.records import Proposal
    from drafters.cache import SlotCache
    from drafters.checkpoint import Checkpoint


@DRAFTERS.register("dflash")
class DFlashDrafter(NetworkDrafter[DFlashConfig, DFlashNetwork]):
    """DFlash block drafters of z-lab, SpecForge and speculators, drafting a block in one pass."""

    formats: ClassVar = formats
    conditioning: ClassVar = "block"
    draft_type: ClassVar = "block"
    borrowed: ClassVar = formats.BORROWED
    sglang: ClassVar = SglangWorker(
        "COSCHED_DFLASH",
        "cosched.engines.sglang.worker.dflash:DFlashWorker",
        builtin="DFLASH",
        has_steps=False,
    )

    def __init__(
        self,
        network: DFlashNetwork,
        target: TargetInfo,
        num_draft_tokens: int,
        origin: Checkpoint[DFlashConfig] | None = None,
    ) -> None:
        super().__init__(network, target, num_draft_tokens, origin)
        self._mask = find_mask(network.config, target)

    @classmethod
    def check(cls, config: DFlashConfig, settings: DrafterSettings, target: TargetInfo) -> None:
        check_fit(Path(settings.path), hidden_size=(config.hidden_size, target.hidden_size))
        if settings.num_draft_tokens >= config.block_size:
            raise ConfigError(
                f"drafter.num_draft_tokens: {settings.num_draft_tokens} is too many, a block of "
                f"{settings.path} has the anchor and {config.block_size - 1} masks"
            )
        find_mask(config, target)

    @classmethod
    def make_network(
        cls, config: DFlashConfig, target_width: int, names: frozenset[str]
    ) -> DFlashNetwork:
        width = config.num_features * target_width
        return DFlashNetwork(config, width, formats.MASK_EMBEDDING in names)

    @classmethod
    def select_tensors(
        cls, checkpoint: Checkpoint[DFlashConfig], target: TargetInfo, directory: Path
    ) -> dict[str, Tensor]:
        tensors = dict(checkpoint.tensors)
        theirs = {"embed_tokens.weight": target.embedding.weight}
        if checkpoint.config.draft_vocab_size is None:
            theirs["lm_head.weight"] = next(target.head.parameters())
        for name, weight in theirs.items():
            table = tensors.pop(name, None)
            if table is not None and not is_targets_own(name, table, weight, directory):
                raise CheckpointError(
                    f"{name} of the draft is not the target's, which a DFlash draft borrows: this "
                    f"draft was trained for another target"
                )
        return tensors

    def cache_writers(self) -> tuple[str, ...]:
        layers = range(self._config.num_hidden_layers)
        keys = [f"layers.{i}.self_attn.{part}_" for i in layers for part in "kv"]
        return ("fc.", "hidden_norm.", *keys)

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, DFlashDrafter]:
        """Small drafters with random weights, one for each kind of checkpoint that there is."""
        shapes = {
            "plain": DFlashConfig(**small_layer(target, "qwen3")),
            "sliding": DFlashConfig(
                **small_layer(target, "qwen3"),
                layer_types=["full_attention", "sliding_attention"],
                sliding_window=7,
            ),
            "sliding, speculators": DFlashConfig(
                **small_layer(target, "qwen3"),
                layer_types=["full_attention", "sliding_attention"],
                sliding_window=7,
                sliding_causal=False,
                window_from="anchor",
            ),
            "reduced vocabulary": DFlashConfig(
                **small_layer(target, "qwen3"), draft_vocab_size=target.vocab_size * 3 // 4
            ),
        }
        features = list(range(min(3, target.num_layers)))
        common: dict[str, Any] = {
            "num_hidden_layers": 2,
            "block_size": num_draft_tokens + 1,
            "mask_token_id": 1,
            "feature_layers": features,
        }
        return {
            name: cls.initialise(
                msgspec.structs.replace(config, **common), target, num_draft_tokens
            )
            for name, config in shapes.items()
        }

    # --- serving ---------------------------------------------------------------------------

    @property
    def spare_positions(self) -> int:
        # The block runs up to K positions past the anchor; its keys lie behind the context's.
        return self.num_draft_tokens + 1

    @torch.no_grad()
    def propose(
        self, state: SlotCache, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        network = self._network
        pending = state.take(num_slots)
        assert pending.features is not None
        self._next_rows(state, 0, num_slots, pending.counts)
        context = network.context(pending.features)
        anchor_B = pending.tokens[[end - 1 for end in pending.ends]]
        # The whole block also where less of it is wanted: its rows see each other, as in training.
        block_BS = anchor_B.new_full((num_slots, self.num_draft_tokens + 1), self._mask)
        block_BS[:, 0] = anchor_B
        hidden = network.block(self._target.embedding(block_BS))
        for index, layer in enumerate(network.layers):
            keys, values = layer.self_attn.keys_values(context, network.rotary, pending.positions)
            state.append(index, pending, keys, values)
        state.grow(pending.counts)
        self._next_rows(state, 0, num_slots)
        starts = state.lengths[:num_slots]
        at_B = torch.tensor(starts, device=hidden.device)
        position_BS = at_B[:, None] + torch.arange(block_BS.shape[1], device=hidden.device)
        end = max(starts) + block_BS.shape[1]
        ragged, windows = min(starts) < max(starts), self._config.windows
        visible = {
            sliding: self._visible(sliding, position_BS, end, state.window, ragged)
            for sliding in set(windows)
        }
        for index, (layer, sliding) in enumerate(zip(network.layers, windows, strict=True)):
            inputs = layer.input_layernorm(hidden)
            queries, keys, values = layer.self_attn.project(inputs, network.rotary, position_BS)
            state.put(index, starts, keys, values)
            attended = attend_cache(
                queries,
                state.keys_YBHLD[index, :num_slots, :, :end],
                state.values_YBHLD[index, :num_slots, :, :end],
                visible[sliding],
            )
            hidden = layer.finish(hidden, attended)
        logits = self.head(network.norm(hidden[:, 1 : num_draft_tokens + 1]))
        logits = over_target(logits, self._target_ids, self._target.vocab_size)
        return picked(choose, logits)

    def _visible(
        self,
        sliding: int | None,
        position_BS: Tensor,
        end: int,
        window: int | None,
        ragged: bool,
    ) -> Tensor | None:
        """Which cache places each row of a block sees, ``[B, S or 1, L]``; None sees all."""
        if not (ragged or window or sliding):
            return None
        at_L = torch.arange(end, device=position_BS.device)
        row_BS1 = position_BS[..., None]
        anchor_B11 = row_BS1[:, :1]
        visible = at_L <= (row_BS1 if sliding and self._config.sliding_causal else row_BS1[:, -1:])
        if sliding and self._config.window_from == "anchor":
            visible = visible & (at_L >= anchor_B11 - sliding)
        elif sliding:
            visible = visible & (at_L > row_BS1 - sliding)
        if window:
            visible = visible & (at_L >= anchor_B11 - window)
        return visible

    # --- learning --------------------------------------------------------------------------

    def replay_states(self, batch: SignalBatch) -> Tensor:
        """Blocks from many anchors at once over the keys and values of one context."""
        assert batch.features_RCF is not None, "a DFlash batch carries features"
        network, dtype = self._network, self._network.fc.weight.dtype
        num_rows, steps = batch.features_RCF.shape[1], batch.paths_RNK.shape[-1]
        at_C = torch.arange(num_rows, device=batch.anchors_RN.device)
        at_S = torch.arange(steps + 1, device=at_C.device)
        position_RC = batch.starts_R[:, None] + at_C
        place_RNS = batch.anchors_RN[..., None] + at_S
        position_RNS = batch.starts_R[:, None, None] + place_RNS
        network.rotary.reserve(batch.last_start + num_rows + steps + 1)

        context_RCE = network.context(batch.features_RCF)
        block_RNS = batch.tokens_RC1.new_full(place_RNS.shape, self._mask)
        block_RNS[..., 0] = batch.tokens_RC1.gather(1, batch.anchors_RN)
        hidden = network.block(self._target.embedding(block_RNS).detach().to(dtype))
        windows = self._config.windows
        masks = {
            sliding: self._packed_visible(sliding, batch, at_C, at_S) for sliding in set(windows)
        }
        for layer, sliding in zip(network.layers, windows, strict=True):
            attention = layer.self_attn
            keys_RCHD, values_RCHD = attention.keys_values(context_RCE, network.rotary, position_RC)
            inputs = layer.input_layernorm(hidden)
            queries, keys, values = attention.project(inputs, network.rotary, position_RNS)
            visible_RNSC, own_ST = masks[sliding]
            attended = attend_packed(
                queries, keys_RCHD, values_RCHD, visible_RNSC, keys, values, own_ST
            )
            hidden = layer.finish(hidden, attended)
        return network.norm(hidden[:, :, 1:])

    def _packed_visible(
        self, sliding: int | None, batch: SignalBatch, at_C: Tensor, at_S: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Which rows of the context and of its block each row sees, ``[R, N, S or 1, C]``, ``[S, S]``.

        None sees all of the block.
        """
        anchor_RN11 = batch.anchors_RN[..., None, None]
        visible = at_C < anchor_RN11
        if batch.window is not None:
            visible = visible & (at_C >= anchor_RN11 - batch.window)
        if not sliding:
            return visible, None
        own_ST = at_S <= (at_S[:, None] if self._config.sliding_causal else at_S[-1])
        if self._config.window_from == "anchor":
            return visible & (at_C >= anchor_RN11 - sliding), own_ST
        visible = visible & (at_C > anchor_RN11 + at_S[:, None] - sliding)
        return visible, own_ST & (at_S > at_S[:, None] - sliding)


def find_mask(config: DFlashConfig, target: TargetInfo) -> int:
    """The mask token's id.

    Raises:
        CheckpointError: it lies outside the target's embedding, or the tokenizer lacks it.
    """
    known = target.token_ids() or {}
    if config.mask_token_id is None:
        if config.mask_token not in known:
            raise CheckpointError(
                f"the draft names no mask_token_id, and the target's tokenizer lacks its mask token "
                f"{config.mask_token!r}"
            )
        return known[config.mask_token]
    if not 0 <= config.mask_token_id < target.vocab_size:
        raise CheckpointError(
            f"mask_token_id of the draft is {config.mask_token_id}, the target's embedding has "
            f"{target.vocab_size} rows: its tokenizer lacks the mask token"
        )
    if known.get(config.mask_token, config.mask_token_id) != config.mask_token_id:
        raise CheckpointError(
            f"mask_token_id of the draft is {config.mask_token_id}, but the target's tokenizer has "
            f"{config.mask_token!r} at {known[config.mask_token]}"
        )
    return config.mask_token_id
