"""EAGLE-3 as a drafter.

Row t pairs the target's features after position t with the token at t + 1 and predicts the token
at t + 2. Its keys and values in the top layer depend on nothing but what is below, so in a head of
one layer a committed row needs no attention at all: only the newest row of a request attends, and
the chain goes on from there with the top layer's output in place of the features. In a head of more
layers committed rows attend in all but the top one.

Letters: B slots, R rows, C context rows, N anchors, K drafted tokens, F fused feature width,
E model width, H key-value heads, J query heads, D head width, V draft vocabulary, W tokens of a tree's level.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, DrafterSettings, TargetInfo
from cosched.records import Proposal, SglangWorker, SignalBatch
from cosched.registry import DRAFTERS
from drafters.attention import attend_cache, attend_context, causal, gather_rows
from drafters.base import NetworkDrafter, check_fit, is_targets_own, note
from drafters.config import small_layer
from drafters.eagle3 import formats
from drafters.eagle3.chain import Chain, attend_pending
from drafters.eagle3.config import Eagle3Config
from drafters.eagle3.network import Eagle3Network
from drafters.eagle3.tree import GrowingTree, run_level
from drafters.vocabulary import over_target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from drafters.cache import SlotCache
    from drafters.checkpoint import Checkpoint

EMBEDDING = "embed_tokens.weight"
FUSION = ("fc.", "fc_norm.", "input_norm.", "embed_tokens.")


class Eagle3Settings(DrafterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``norm_output`` says what that key means in a flat checkpoint that has it (formats.py).

    ``top_k`` above 1 drafts a tree of so many tokens at each of ``num_draft_tokens`` depths: those with which
    the likeliest paths go on, or of sampled text as many drawn behind each of these as go on there.
    """

    top_k: Annotated[int, Meta(ge=1, le=64)] = 1
    norm_output: Literal["fed_back", "before_head"] | None = None


@DRAFTERS.register("eagle3")
class Eagle3Drafter(NetworkDrafter[Eagle3Config, Eagle3Network]):
    """EAGLE-3 heads of SafeAILab, SpecForge and speculators, drafting a chain, or a tree (``top_k``)."""

    Settings: ClassVar = Eagle3Settings
    formats: ClassVar = formats
    conditioning: ClassVar = "chain"
    draft_type: ClassVar = "chain"
    borrowed: ClassVar = (EMBEDDING,)
    sglang: ClassVar = SglangWorker(
        "COSCHED_EAGLE3",
        "cosched.engines.sglang.worker.eagle3:Eagle3Worker",
        builtin="EAGLE3",
        changes_length=True,
        width="top_k",
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
        self._is_shorter = self._embedding.num_embeddings < target.vocab_size
        self._top_k = 1

    def take_settings(self, settings: DrafterSettings) -> None:
        self.draft_trees(getattr(settings, "top_k", 1))  # those of the role alone have none

    def draft_trees(self, top_k: int) -> Self:
        """From now on of so many tokens at each depth; 1: chains. Returns itself."""
        self._top_k = top_k
        self.num_tree_tokens = top_k * self.num_draft_tokens if top_k > 1 else 0
        return self

    @property
    def own_settings(self) -> Mapping[str, Any]:
        return {"top_k": self._top_k}

    def clone(self, dtype: torch.dtype) -> Self:
        return super().clone(dtype).draft_trees(self._top_k)

    @classmethod
    def check(cls, config: Eagle3Config, settings: Eagle3Settings, target: TargetInfo) -> None:
        directory, width = Path(settings.path), target.hidden_size
        if config.target_hidden_size is None:
            check_fit(directory, hidden_size=(config.hidden_size, width))
        else:
            check_fit(directory, target_hidden_size=(config.target_hidden_size, width))
        if config.draft_vocab_size is None:  # it drafts with the target's head
            check_fit(directory, hidden_size=(config.hidden_size, width))
            if config.misread:
                note(f"the draft {directory} has no head of its own and borrows the target's")

    @classmethod
    def make_network(
        cls, config: Eagle3Config, target_width: int, names: frozenset[str]
    ) -> Eagle3Network:
        narrower = config.hidden_size != target_width
        return Eagle3Network(config, target_width, narrower or EMBEDDING in names)

    @classmethod
    def select_tensors(
        cls, checkpoint: Checkpoint[Eagle3Config], target: TargetInfo, directory: Path
    ) -> dict[str, Tensor]:
        tensors = dict(checkpoint.tensors)
        if not _own_embedding(checkpoint, target, directory):
            tensors.pop(EMBEDDING, None)
        return tensors

    def cache_writers(self) -> tuple[str, ...]:
        top = self._network.top
        below = ("midlayer.", *(f"layers.{i}." for i in range(1, top))) if top else ()
        last = f"layers.{top}." if top else "midlayer."
        parts = ("input_layernorm.", "hidden_norm.", "self_attn.k_", "self_attn.v_")
        return (*FUSION, *below, *(last + part for part in parts))

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
            "two layers": Eagle3Config(
                **llama, num_hidden_layers=2, draft_vocab_size=target.vocab_size, bias=True
            ),
        }
        features = list(range(min(3, target.num_layers)))
        made = {
            name: cls.initialise(
                msgspec.structs.replace(config, feature_layers=features), target, num_draft_tokens
            )
            for name, config in shapes.items()
        }
        for name in ("plain", "two layers"):
            config = msgspec.structs.replace(shapes[name], feature_layers=features)
            tree = cls.initialise(config, target, num_draft_tokens).draft_trees(2)
            made[f"tree, {name}"] = tree
        return made

    # --- serving ---------------------------------------------------------------------------

    @property
    def spare_positions(self) -> int:
        # The draft runs up to so many rows past the last committed one.
        return self.num_verified

    @torch.no_grad()
    def propose(
        self, state: SlotCache, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        network = self._network
        inputs, residual = self._run_pending(state, num_slots)
        self._next_rows(state, 0, num_slots)
        newest = [length - 1 for length in state.lengths[:num_slots]]
        position_B = torch.tensor(newest, device=inputs.device)
        queries = network.queries(inputs, position_B, network.top)
        attended = self._attend(state, network.top, queries, newest, position_B)
        normed, hidden = network.outputs(network.finish(residual, attended, network.top))
        if self._top_k > 1:
            return self._tree(state, choose, num_draft_tokens, newest, normed, hidden)
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        for k in range(num_draft_tokens):
            if k:
                position_B = position_B + 1
                newest = [row + 1 for row in newest]
                inputs, residual = network.inputs(self._look_up(tokens[-1]), hidden)
                for layer in range(network.top + 1):
                    if layer:
                        inputs, residual = network.inputs_above(hidden, layer)
                    queries, keys, values = network.project(inputs, position_B, layer)
                    state.put(layer, newest, keys[:, None], values[:, None])
                    attended = self._attend(state, layer, queries, newest, position_B)
                    hidden = network.finish(residual, attended, layer)
                normed, hidden = network.outputs(hidden)
            at_k_BV = over_target(self.head(normed), self._target_ids, self._target.vocab_size)
            if (chosen := choose(k, at_k_BV)) is None:
                break
            logits.append(at_k_BV)
            tokens.append(chosen)
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def _tree(
        self,
        state: SlotCache,
        choose: Choose,
        depth: int,
        newest: list[int],
        normed: Tensor,
        hidden: Tensor,
    ) -> Proposal:
        """A tree behind the newest rows, from what the head reads there and what is fed on, ``[B, E]``."""
        tree = GrowingTree(newest, self._top_k, state.window, normed.device)
        normed, hidden = normed[:, None], hidden[:, None]
        for level in range(depth):
            logits = over_target(self.head(normed), self._target_ids, self._target.vocab_size)
            tokens, hidden = tree.grow(choose, logits, hidden)
            if level + 1 < depth:
                embedded = self._look_up(tokens)
                normed, hidden = run_level(self._network, state, tree, embedded, hidden)
        return tree.proposal()

    def _run_pending(self, state: SlotCache, num_slots: int) -> tuple[Tensor, Tensor]:
        """Write the keys of all committed rows; returns inputs and residual of each slot's newest.

        They are those of the top layer.
        """
        network, pending = self._network, state.take(num_slots)
        assert pending.features is not None
        self._next_rows(state, 0, num_slots, pending.counts)
        hidden = network.fuse(pending.features)
        inputs, residual = network.inputs(self._look_up(pending.tokens), hidden)
        for layer in range(network.top):
            queries, keys, values = network.project(inputs, pending.positions, layer)
            state.append(layer, pending, keys, values)
            attended = attend_pending(state, layer, pending, queries)
            hidden = network.finish(residual, attended, layer)
            inputs, residual = network.inputs_above(hidden, layer + 1)
        top = network.keys_values(inputs, pending.positions, network.top)
        state.append(network.top, pending, *top)
        state.grow(pending.counts)
        if num_slots == 1:
            return inputs[-1:], residual[-1:]
        newest = [end - 1 for end in pending.ends]
        return inputs[newest], residual[newest]

    def _attend(
        self,
        state: SlotCache,
        layer: int,
        queries_BJD: Tensor,
        newest: list[int],
        position_B: Tensor,
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
            state.keys_YBHLD[layer, :num_slots, :, begin:end],
            state.values_YBHLD[layer, :num_slots, :, begin:end],
            visible,
        ).squeeze(1)

    # --- learning --------------------------------------------------------------------------

    def replay_states(self, batch: SignalBatch) -> Tensor:
        """Chains from many anchors at once: step-0 keys of the context, then each its own.

        Step s of an anchor sees, in every layer, the context rows before the anchor and the s rows
        it drafted itself (training-time test, EAGLE-3, arXiv 2503.01840).
        """
        assert batch.features_RCF is not None, "an EAGLE-3 batch carries features"
        network, dtype = self._network, self._network.fc.weight.dtype
        num_rows, steps = batch.features_RCF.shape[1], batch.paths_RNK.shape[-1]
        at_C = torch.arange(num_rows, device=batch.anchors_RN.device)
        position_RC = batch.starts_R[:, None] + at_C
        network.rotary.reserve(batch.last_start + num_rows + steps)

        embedded = self._embed(batch.tokens_RC1[:, 1:], dtype)
        inputs_RCX, residual_RCE = network.inputs(embedded, network.fuse(batch.features_RCF))
        contexts: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        visible_CC = causal(at_C, at_C, batch.window) if batch.window else None
        for layer in range(network.top):
            queries, keys, values = network.project(inputs_RCX, position_RC, layer)
            contexts.append((keys, values))
            attended = attend_context(queries, keys, values, visible_CC)
            hidden_RCE = network.finish(residual_RCE, attended, layer)
            inputs_RCX, residual_RCE = network.inputs_above(hidden_RCE, layer + 1)
        contexts.append(network.keys_values(inputs_RCX, position_RC, network.top))

        row_RN = batch.anchors_RN - 1  # the newest row whose features the anchor may use
        inputs, residual = gather_rows(inputs_RCX, row_RN), gather_rows(residual_RCE, row_RN)
        position_RN = batch.starts_R[:, None] + row_RN
        chains = [Chain(*context) for context in contexts]
        states: list[Tensor] = []
        hidden = residual
        for step in range(steps):
            visible_RNC = at_C <= row_RN[..., None]
            if batch.window is not None:
                visible_RNC = visible_RNC & (at_C > row_RN[..., None] + step - batch.window)
            own_1S = None
            if batch.window is not None and batch.window < step + 1:  # as short as the draft itself
                own_1S = torch.arange(1, step + 1, device=at_C.device)[None] > step - batch.window
            if not step:  # the row is the context's, which has been through all but the top layer
                queries = network.queries(inputs, position_RN, network.top)
                attended = chains[-1].attend(queries, visible_RNC, own_1S)
                hidden = network.finish(residual, attended, network.top)
            else:
                drafted = self._embed(batch.paths_RNK[..., step - 1], dtype)
                inputs, residual = network.inputs(drafted, hidden)
                position_RN = position_RN + 1
                for layer, chain in enumerate(chains):
                    if layer:
                        inputs, residual = network.inputs_above(hidden, layer)
                    queries, keys, values = network.project(inputs, position_RN, layer)
                    chain.extend(keys, values)
                    attended = chain.attend(queries, visible_RNC, own_1S)
                    hidden = network.finish(residual, attended, layer)
            normed, hidden = network.outputs(hidden)
            states.append(normed)
        return torch.stack(states, 2)

    def _look_up(self, tokens: Tensor) -> Tensor:
        """Embeddings; a token of the target's padding, which a table of one's own may lack, is any."""
        last = self._embedding.num_embeddings - 1
        return self._embedding(tokens.clamp(max=last) if self._is_shorter else tokens)

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings; where they are the target's, training must not reach them."""
        embedded = self._look_up(tokens)
        return embedded.detach().to(dtype) if self._network.embed_tokens is None else embedded


def _own_embedding(
    checkpoint: Checkpoint[Eagle3Config], target: TargetInfo, directory: Path
) -> bool:
    """Whether the checkpoint's embedding is its own, and not a copy of the target's.

    Raises:
        CheckpointError: it is its own in a flat file, whose readers would take the target's.
    """
    table = checkpoint.tensors.get(EMBEDDING)
    if table is None:
        return False
    if checkpoint.config.target_width != checkpoint.config.hidden_size:
        return True
    if is_targets_own(EMBEDDING, table, target.embedding.weight, directory):
        return False
    if checkpoint.format != "speculators":
        raise CheckpointError(
            f"{EMBEDDING} of the draft is not the target's, and who reads this format would draft "
            f"with the target's: this draft was trained for another target"
        )
    return True
