"""PARD and PARD-2 as a drafter.

A round runs the newly committed tokens and K - 1 masks through the language model, once: logits at
the anchor give the first drafted token, logits at mask i the one i places on. Keys of real tokens
stay in the cache, those of masks are overwritten. PARD-2 adds to every token the target's features
of the token before it; masks share those of the anchor.

Letters: B slots, R rows, T rows of a forward, C context rows, N anchors, K drafted tokens,
M = K - 1 masks, F fused feature width, E model width, U draft vocabulary, L cache length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import MOST_UNDRAFTED
from cosched.records import SglangWorker, SignalBatch
from cosched.registry import DRAFTERS
from drafters.attention import attend_cache, attend_context, attend_packed, causal, gather_rows
from drafters.base import NetworkDrafter, picked
from drafters.config import small_layer
from drafters.pard import formats
from drafters.pard.config import PardConfig
from drafters.pard.network import PardNetwork
from drafters.vocabulary import over_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosched.protocols import Choose, DrafterSettings, TargetInfo
    from cosched.records import Proposal, Segment
    from drafters.cache import SlotCache
    from drafters.checkpoint import Checkpoint


@DRAFTERS.register("pard")
class PardDrafter(NetworkDrafter[PardConfig, PardNetwork]):
    """PARD and PARD-2 parallel drafters of AMD, drafting a block through mask tokens in one pass."""

    formats: ClassVar = formats
    conditioning: ClassVar = "block"
    draft_type: ClassVar = "parallel"
    sglang: ClassVar = SglangWorker(
        "COSCHED_PARD",
        "cosched.engines.sglang.worker.adapted_pard:AdaptedPardWorker",
        builtin="STANDALONE",
        stock=False,
        algorithm_class="cosched.engines.sglang.worker.pard_algorithm:algorithm",
    )

    def __init__(
        self,
        network: PardNetwork,
        target: TargetInfo,
        num_draft_tokens: int,
        origin: Checkpoint[PardConfig] | None = None,
    ) -> None:
        super().__init__(network, target, num_draft_tokens, origin)
        # Tables of one tokenizer are padded to different lengths; what both have is the vocabulary.
        self._num_shared = min(self._config.vocab_size, target.vocab_size)
        whole = self._num_shared == target.vocab_size
        device = network.model.norm.weight.device
        self._target_ids = None if whole else torch.arange(self._num_shared, device=device)

    @classmethod
    def check(cls, config: PardConfig, settings: DrafterSettings, target: TargetInfo) -> None:
        layers = config.layers_of(target.num_layers, target.model_type)
        width = len(layers) * target.hidden_size
        if config.uses_features and config.pard2_target_dim not in {None, width}:
            raise CheckpointError(
                f"the draft {settings.path} has pard2_target_dim {config.pard2_target_dim}, the "
                f"target has {len(layers)} layers of {target.hidden_size} for it: this draft was "
                f"trained for another target"
            )

    @classmethod
    def make_network(
        cls, config: PardConfig, target_width: int, names: frozenset[str]
    ) -> PardNetwork:
        del names  # every tensor of a language model is its own
        return PardNetwork(config, config.num_features * target_width)

    def cache_writers(self) -> tuple[str, ...]:
        last = self._config.num_hidden_layers - 1
        below = [f"model.layers.{i}." for i in range(last)]
        parts = ("input_layernorm.", "self_attn.k_", "self_attn.v_")
        top = [f"model.layers.{last}.{part}" for part in parts]
        return ("model.embed_tokens.", "target_proj.", *below, *top)

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, PardDrafter]:
        """Small drafters with random weights, one for each kind of checkpoint that there is."""
        shapes = {
            "qwen3": PardConfig(
                **small_layer(target, "qwen3"), tie_word_embeddings=True, pard_token=1
            ),
            "qwen2": PardConfig(
                **small_layer(target, "qwen2"),
                tie_word_embeddings=True,
                pard_token=1,
            ),
            "pard2": PardConfig(
                **small_layer(target, "llama"),
                pard_token=1,
                pard2=True,
                pard2_target_layers=[-1, -2],
            ),
        }
        return {
            name: cls.initialise(
                msgspec.structs.replace(config, num_hidden_layers=2), target, num_draft_tokens
            )
            for name, config in shapes.items()
        }

    # --- serving ---------------------------------------------------------------------------

    @property
    def spare_positions(self) -> int:
        # A slot with few new tokens is padded to one with K + 1 of them and those of rounds that
        # drafted nothing, and masks follow.
        return 2 * self.num_draft_tokens + 2 + MOST_UNDRAFTED

    @torch.no_grad()
    def observe(self, state: SlotCache, slot: int, segment: Segment) -> None:
        tokens_R, features_RF = segment.tokens_R1[1:], segment.features_RF
        if state.lengths[slot] == 0 and not state.rows[slot]:
            tokens_R = segment.tokens_R1  # the first token of a text has no feature before it
            if features_RF is not None:
                features_RF = F.pad(features_RF, (0, 0, 1, 0))
        if not self.signal.feature_layers:
            features_RF = None
        early = len(tokens_R) - 1 - self.num_draft_tokens
        if early > 0:  # a prompt: run it by itself, so that no other slot is padded to its length
            assert not state.rows[slot]
            features = None if features_RF is None else features_RF[None, :early]
            self._run(state, slot, [state.lengths[slot]], tokens_R[None, :early], features)
            state.lengths[slot] += early
            tokens_R = tokens_R[early:]
            features_RF = None if features_RF is None else features_RF[early:]
        state.add(slot, tokens_R, features_RF)

    @torch.no_grad()
    def propose(
        self, state: SlotCache, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        pending = state.take(num_slots)
        counts, starts = pending.counts, state.lengths[:num_slots]
        num_rows = max(counts) + num_draft_tokens - 1
        ids_BT = pending.tokens.new_full((num_slots, num_rows), self._network.config.pard_token)
        features_BTF = None
        if pending.features is not None:
            shape = (num_slots, num_rows, pending.features.shape[-1])
            features_BTF = pending.features.new_empty(shape)
        for slot, (end, count) in enumerate(zip(pending.ends, counts, strict=True)):
            ids_BT[slot, :count] = pending.tokens[end - count : end]
            if features_BTF is not None and pending.features is not None:
                features_BTF[slot, :count] = pending.features[end - count : end]
                features_BTF[slot, count:] = pending.features[end - 1]
        hidden = self._run(state, 0, starts, ids_BT, features_BTF)
        state.grow(counts)
        if min(counts) == max(counts):  # the anchors' rows and those of their masks are the last
            hidden = hidden[:, -num_draft_tokens:]
        else:
            anchor_B = torch.tensor(counts, device=hidden.device) - 1
            ahead_K = torch.arange(num_draft_tokens, device=hidden.device)
            hidden = gather_rows(hidden, anchor_B[:, None] + ahead_K)
        logits = over_target(self.project(hidden), self._target_ids, self._target.vocab_size)
        return picked(choose, logits)

    def _run(
        self,
        state: SlotCache,
        first_slot: int,
        starts: list[int],
        ids_BT: Tensor,
        features_BTF: Tensor | None,
    ) -> Tensor:
        """Hidden states ``[B, T, E]`` of rows over the cache, which takes their keys and values.

        The rows are those of the slots from ``first_slot`` on, and begin at ``starts``.
        """
        network = self._network
        self._next_rows(state, first_slot, len(starts))
        hidden = self._embed(ids_BT, features_BTF)
        end = max(starts) + ids_BT.shape[1]
        at_L = torch.arange(end, device=ids_BT.device)
        position_BT = torch.tensor(starts, device=ids_BT.device)[:, None] + at_L[: ids_BT.shape[1]]
        slots = slice(first_slot, first_slot + len(starts))
        windows = [_narrower(state.window, window) for window in self._config.windows]
        visible = {window: causal(position_BT, at_L, window) for window in set(windows)}
        for index, (layer, window) in enumerate(zip(network.model.layers, windows, strict=True)):
            queries, keys, values = layer.self_attn.project(
                layer.input_layernorm(hidden), network.rotary, position_BT
            )
            state.put(index, starts, keys, values, first_slot)
            attended = attend_cache(
                queries,
                state.keys_YBHLD[index, slots, :, :end],
                state.values_YBHLD[index, slots, :, :end],
                visible[window],
            )
            hidden = layer.finish(hidden, attended)
        return hidden

    # --- learning --------------------------------------------------------------------------

    def replay_states(self, batch: SignalBatch) -> Tensor:
        """Masks behind many anchors at once over one run of the context.

        The context starts with the buffer's first row: what came before it, which serving still had
        in its cache, is not seen; nor is, in PARD-2, the feature before that row.
        """
        network, num_masks = self._network, batch.paths_RNK.shape[-1] - 1
        rotary = network.rotary
        tokens_RC, anchors_RN = batch.tokens_RC1, batch.anchors_RN
        num_rows = tokens_RC.shape[1]
        at_C = torch.arange(num_rows, device=tokens_RC.device)
        ahead_K = torch.arange(num_masks + 1, device=tokens_RC.device)
        ahead_M = ahead_K[1:]
        position_RC = batch.starts_R[:, None] + at_C
        position_RNK = batch.starts_R[:, None, None] + anchors_RN[..., None] + ahead_K
        position_RNM = position_RNK[..., 1:]
        rotary.reserve(batch.last_start + num_rows + num_masks)
        features_RCF = features_RNMF = None
        if self.signal.feature_layers:
            assert batch.features_RCF is not None, "a PARD-2 batch carries features"
            features_RCF = F.pad(batch.features_RCF, (0, 0, 1, 0))
            features_RNMF = gather_rows(features_RCF, anchors_RN)[:, :, None].expand(
                -1, -1, num_masks, -1
            )
        hidden = self._embed(tokens_RC, features_RCF)
        masked = network.embed(
            tokens_RC.new_full(position_RNM.shape, network.config.pard_token), features_RNMF
        )
        windows = [_narrower(batch.window, window) for window in self._config.windows]
        masks = {
            window: _packed_visible(window, at_C, ahead_M, anchors_RN) for window in set(windows)
        }
        *below, (top, window) = zip(network.model.layers, windows, strict=True)
        for layer, window_below in below:
            visible_CC, visible_RNMC, own_MM = masks[window_below]
            queries, keys, values = layer.self_attn.project(
                layer.input_layernorm(hidden), rotary, position_RC
            )
            attended = attend_context(queries, keys, values, visible_CC)
            hidden = layer.finish(hidden, attended)
            if num_masks:
                own = layer.self_attn.project(layer.input_layernorm(masked), rotary, position_RNM)
                attended = attend_packed(own[0], keys, values, visible_RNMC, own[1], own[2], own_MM)
                masked = layer.finish(masked, attended)
        # Of the context nobody looks at the top layer's output but at anchors: they go with the masks.
        keys, values = top.self_attn.keys_values(top.input_layernorm(hidden), rotary, position_RC)
        rows = torch.cat((gather_rows(hidden, anchors_RN)[:, :, None], masked), 2)
        own = top.self_attn.project(top.input_layernorm(rows), rotary, position_RNK)
        _, visible_RNKC, own_KK = _packed_visible(window, at_C, ahead_K, anchors_RN)
        own_keys, own_values = (of_rows[:, :, 1:] for of_rows in own[1:])  # an anchor's are context
        attended = attend_packed(
            own[0], keys, values, visible_RNKC, own_keys, own_values, own_KK[:, 1:]
        )
        return top.finish(rows, attended)

    def _embed(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """``network.embed``; a token of the target's padding, which this table may lack, is any."""
        last = self._config.vocab_size - 1
        shorter = self._config.vocab_size < self._target.vocab_size
        return self._network.embed(tokens.clamp(max=last) if shorter else tokens, features)

    def project(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self._network.head(states, tokens)[..., : self._num_shared]


def _narrower(one: int | None, other: int | None) -> int | None:
    return min(one, other) if one and other else one or other


def _packed_visible(
    window: int | None, at_C: Tensor, ahead_M: Tensor, anchors_RN: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What rows of the context see of it, masks of it ``[R, N, M or 1, C]``, and of each other.

    None is plain causality.
    """
    visible_RNMC = (at_C <= anchors_RN[..., None])[:, :, None]
    if window:
        place_RNM1 = (anchors_RN[..., None] + ahead_M)[..., None]
        visible_RNMC = visible_RNMC & (at_C > place_RNM1 - window)
    visible_CC = causal(at_C, at_C, window) if window else None
    return visible_CC, visible_RNMC, causal(ahead_M, ahead_M, window)
