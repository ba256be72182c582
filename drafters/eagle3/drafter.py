"""EAGLE-3 as a drafter.

Row t pairs the target's features after position t with the token at t + 1 and predicts the token
at t + 2. Its keys and values depend on nothing but its own inputs, so a committed row needs no
attention at all: only the newest row of a request attends, and the chain goes on from there with
the layer's own output in place of the features.

Letters: B slots, R rows, C context rows, N anchors, K drafted tokens, F fused feature width,
E model width, H key-value heads, J query heads, D head width, V draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, DrafterSettings, TargetInfo
from cosched.records import Proposal, SglangWorker, SignalBatch
from cosched.registry import DRAFTERS
from drafters.attention import attend_cache, attend_packed, gather_rows
from drafters.base import NetworkDrafter, check_fit, is_copy
from drafters.config import small_layer
from drafters.eagle3 import formats
from drafters.eagle3.config import Eagle3Config
from drafters.eagle3.network import Eagle3Network
from drafters.vocabulary import over_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drafters.cache import SlotCache
    from drafters.checkpoint import Checkpoint

EMBEDDING = "embed_tokens.weight"
# Keys and values of committed rows are made of these; everything else may change under them.
CACHE_WRITERS = (
    "fc.", "fc_norm.", "input_norm.", "embed_tokens.", "midlayer.input_layernorm.",
    "midlayer.hidden_norm.", "midlayer.self_attn.k_", "midlayer.self_attn.v_",
)  # fmt: skip


class Eagle3Settings(DrafterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``norm_output`` says what that key means in a flat checkpoint that has it (formats.py)."""

    norm_output: Literal["fed_back", "before_head"] | None = None


@DRAFTERS.register("eagle3")
class Eagle3Drafter(NetworkDrafter[Eagle3Config, Eagle3Network]):
    """EAGLE-3 heads of SafeAILab, SpecForge and speculators, drafting a chain."""

    Settings: ClassVar = Eagle3Settings
    formats: ClassVar = formats
    conditioning: ClassVar = "chain"
    draft_type: ClassVar = "chain"
    borrowed: ClassVar = (EMBEDDING,)
    sglang: ClassVar = SglangWorker(
        "COSCHED_EAGLE3", "cosched.engines.sglang.worker.eagle3:Eagle3Worker", builtin="EAGLE3"
    )

    def __init__(
        self,
        network: Eagle3Network,
        target: TargetInfo,
        num_draft_tokens: int,
        origin: Checkpoint[Eagle3Config] | None = None,
    ) -> None:
        super().__init__(network, target, num_draft_tokens, origin)
        self._embedding = target.embedding if network.embed_tokens is None else network.embed_tokens

    @classmethod
    def check(cls, config: Eagle3Config, settings: Eagle3Settings, target: TargetInfo) -> None:
        directory, width = Path(settings.path), target.hidden_size
        if config.target_hidden_size is None:
            check_fit(directory, hidden_size=(config.hidden_size, width))
        else:
            check_fit(directory, target_hidden_size=(config.target_hidden_size, width))
        check_fit(directory, vocab_size=(config.vocab_size, target.vocab_size))
        if config.draft_vocab_size is None:  # it drafts with the target's head
            check_fit(directory, hidden_size=(config.hidden_size, width))

    @classmethod
    def make_network(
        cls, config: Eagle3Config, target_width: int, names: frozenset[str]
    ) -> Eagle3Network:
        narrower = config.hidden_size != target_width
        return Eagle3Network(config, target_width, narrower or EMBEDDING in names)

    @classmethod
    def select_tensors(
        cls, checkpoint: Checkpoint[Eagle3Config], target: TargetInfo
    ) -> dict[str, Tensor]:
        tensors = dict(checkpoint.tensors)
        if not _own_embedding(checkpoint, target):
            tensors.pop(EMBEDDING, None)
        return tensors

    def cache_writers(self) -> tuple[str, ...]:
        return CACHE_WRITERS

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, Eagle3Drafter]:
        """Small drafters with random weights, one for each kind of checkpoint that there is."""
        llama = small_layer(target, "llama")
        shapes = {
            "plain": Eagle3Config(**llama, draft_vocab_size=target.vocab_size),
            "reduced vocabulary": Eagle3Config(
                **llama, draft_vocab_size=target.vocab_size * 3 // 4
            ),
            "speculators": Eagle3Config(
                **small_layer(target, "qwen3"),
                draft_vocab_size=target.vocab_size,
                norm_before_residual=True,
                fc_norm=True,
                norm_output=True,
            ),
            "the target's head": Eagle3Config(**llama, norm_before_fc=True),
        }
        features = list(range(min(3, target.num_layers)))
        return {
            name: cls.initialise(
                msgspec.structs.replace(config, feature_layers=features), target, num_draft_tokens
            )
            for name, config in shapes.items()
        }

    # --- serving ---------------------------------------------------------------------------

    @property
    def spare_positions(self) -> int:
        # The chain runs up to K positions past the last committed one.
        return self.num_draft_tokens

    @torch.no_grad()
    def propose(
        self, state: SlotCache, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        network = self._network
        inputs, residual = self._run_pending(state, num_slots)
        self._next_rows(state, 0, num_slots)
        newest = [length - 1 for length in state.lengths[:num_slots]]
        position_B = torch.tensor(newest, device=inputs.device)
        queries = network.queries(inputs, position_B)
        tokens, logits = [], []
        hidden = residual
        for k in range(num_draft_tokens):
            if k:
                inputs, residual = network.inputs(self._embedding(tokens[-1]), hidden)
                position_B = position_B + 1
                newest = [row + 1 for row in newest]
                queries, keys, values = network.project(inputs, position_B)
                state.put(0, newest, keys[:, None], values[:, None])
            attended = self._attend(state, queries, newest, position_B)
            normed, hidden = network.finish(residual, attended)
            logits.append(over_target(self.head(normed), self._target_ids, self._target.vocab_size))
            tokens.append(choose(k, logits[-1]))
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def _run_pending(self, state: SlotCache, num_slots: int) -> tuple[Tensor, Tensor]:
        """Write the keys of all committed rows; returns inputs and residual of each slot's newest."""
        network, pending = self._network, state.take(num_slots)
        assert pending.features is not None
        self._next_rows(state, 0, num_slots, pending.counts)
        hidden = network.fuse(pending.features)
        inputs, residual = network.inputs(self._embedding(pending.tokens), hidden)
        state.append(0, pending, *network.keys_values(inputs, pending.positions))
        state.grow(pending.counts)
        if num_slots == 1:
            return inputs[-1:], residual[-1:]
        newest = [end - 1 for end in pending.ends]
        return inputs[newest], residual[newest]

    def _attend(
        self, state: SlotCache, queries_BJD: Tensor, newest: list[int], position_B: Tensor
    ) -> Tensor:
        """Attention of each slot's newest row over its cache, ``[B, J, D]``."""
        num_slots, end = len(newest), max(newest) + 1
        begin = max(0, min(newest) + 1 - state.window) if state.window else 0
        visible = None
        if min(newest) + 1 < end:
            at = torch.arange(begin, end, device=position_B.device)
            visible = at <= position_B[:, None]
            if state.window:
                visible &= at > position_B[:, None] - state.window
            visible = visible[:, None]
        return attend_cache(
            queries_BJD[:, None],
            state.keys_YBHLD[0, :num_slots, :, begin:end],
            state.values_YBHLD[0, :num_slots, :, begin:end],
            visible,
        ).squeeze(1)

    # --- learning --------------------------------------------------------------------------

    def replay_states(self, batch: SignalBatch) -> Tensor:
        """Chains from many anchors at once: step-0 keys of the context, then each its own.

        Step s of an anchor sees the context rows before the anchor and the s rows it drafted
        itself (training-time test, EAGLE-3, arXiv 2503.01840).
        """
        assert batch.features_RCF is not None, "an EAGLE-3 batch carries features"
        network, dtype = self._network, self._network.fc.weight.dtype
        num_rows, steps = batch.features_RCF.shape[1], batch.paths_RNK.shape[-1]
        at_C = torch.arange(num_rows, device=batch.anchors_RN.device)
        position_RC = batch.starts_R[:, None] + at_C
        network.rotary.reserve(int(batch.starts_R.max()) + num_rows + steps)  # host waits

        embedded = self._embed(batch.tokens_RC1[:, 1:], dtype)
        inputs_RCX, residual_RCE = network.inputs(embedded, network.fuse(batch.features_RCF))
        keys_RCHD, values_RCHD = network.keys_values(inputs_RCX, position_RC)

        row_RN = batch.anchors_RN - 1  # the newest row whose features the anchor may use
        inputs, residual = gather_rows(inputs_RCX, row_RN), gather_rows(residual_RCE, row_RN)
        position_RN = batch.starts_R[:, None] + row_RN
        queries = network.queries(inputs, position_RN)
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        states: list[Tensor] = []
        hidden = residual
        for step in range(steps):
            if step:
                drafted = self._embed(batch.paths_RNK[..., step - 1], dtype)
                inputs, residual = network.inputs(drafted, hidden)
                position_RN = position_RN + 1
                queries, keys, values = network.project(inputs, position_RN)
                own_keys.append(keys)
                own_values.append(values)
            visible_RNC = at_C <= row_RN[..., None]
            if batch.window is not None:
                visible_RNC = visible_RNC & (at_C > row_RN[..., None] + step - batch.window)
            own_1S = None
            if batch.window is not None and batch.window < step + 1:  # as short as the draft itself
                own_1S = torch.arange(1, step + 1, device=at_C.device)[None] > step - batch.window
            attended = attend_packed(
                queries[:, :, None],
                keys_RCHD,
                values_RCHD,
                visible_RNC[:, :, None],
                torch.stack(own_keys, 2) if step else None,
                torch.stack(own_values, 2) if step else None,
                own_1S,
            ).squeeze(2)
            normed, hidden = network.finish(residual, attended)
            states.append(normed)
        return torch.stack(states, 2)

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings; where they are the target's, training must not reach them."""
        embedded = self._embedding(tokens)
        return embedded.detach().to(dtype) if self._network.embed_tokens is None else embedded


def _own_embedding(checkpoint: Checkpoint[Eagle3Config], target: TargetInfo) -> bool:
    """Whether the checkpoint's embedding is its own, and not a copy of the target's.

    Raises:
        CheckpointError: it is its own in a flat file, whose readers would take the target's.
    """
    table = checkpoint.tensors.get(EMBEDDING)
    if table is None:
        return False
    if checkpoint.config.target_width != checkpoint.config.hidden_size:
        return True
    if is_copy(table, target.embedding.weight):
        return False
    if checkpoint.format != "speculators":
        raise CheckpointError(
            f"{EMBEDDING} of the draft is not the target's, and who reads this format would draft "
            f"with the target's: this draft was trained for another target"
        )
    return True
