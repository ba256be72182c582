"""EAGLE-3: one decoder layer over fused target features, drafting a chain.

Row t pairs the target's features after position t with the token at t + 1 and predicts the token
at t + 2. Its keys and values depend on nothing but its own inputs, so a committed row needs no
attention at all: only the newest row of a request attends, and the chain goes on from there with
the layer's own output in place of the features.

Letters: B slots, R rows, C context rows, N anchors, K drafted tokens, F fused feature width,
E model width, H key-value heads, G query heads per key-value head, D head width, L cache length,
V draft vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosched.errors import CheckpointError, ConfigError
from cosched.protocols import Choose, DrafterSettings, TargetInfo
from cosched.records import Proposal, SignalBatch, SignalSpec
from cosched.registry import DRAFTERS
from drafters.checkpoint import check_tensors, read_config, read_tensors, write_checkpoint
from drafters.layers import RMSNorm, Rotary, SwiGLU

if TYPE_CHECKING:
    from collections.abc import Sequence

# Options of published heads that change the arithmetic and are not implemented here yet.
UNSUPPORTED_OPTIONS = ("norm_output", "fc_norm", "norm_before_fc", "norm_before_residual")


class Eagle3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of a SafeAILab or SpecForge ``config.json`` that shape the head."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    draft_vocab_size: int | None = None
    num_hidden_layers: int = 1
    max_position_embeddings: int = 4096
    eagle_config: dict[str, Any] | None = None

    @classmethod
    def read(cls, directory: Path) -> Eagle3Config:
        """Read and check ``config.json``.

        Raises:
            CheckpointError: a key is missing or mistyped, or asks for what is not supported.
        """
        raw = read_config(directory)
        try:
            config = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
        wanted = [key for key in UNSUPPORTED_OPTIONS if raw.get(key)]
        if config.rope_scaling:
            wanted.append("rope_scaling")
        if config.num_hidden_layers != 1:
            wanted.append(f"num_hidden_layers={config.num_hidden_layers}")
        if wanted:
            raise CheckpointError(
                f"{directory / 'config.json'} asks for {', '.join(wanted)}, which the eagle3 "
                f"drafter does not implement; loading it anyway would draft badly in silence"
            )
        return config

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def theta(self) -> float:
        """RoPE base; transformers 5 writes it under ``rope_parameters`` only."""
        if self.rope_theta is not None:
            return self.rope_theta
        return float((self.rope_parameters or {}).get("rope_theta", 10000.0))

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """Target layers whose outputs are fused: 'after that layer', 0-based."""
        given = (self.eagle_config or {}).get("eagle_aux_hidden_state_layer_ids")
        layers = tuple(given) if given else (1, num_layers // 2 - 1, num_layers - 4)
        if len(set(layers)) != len(layers) or not all(0 <= i < num_layers for i in layers):
            raise CheckpointError(
                f"the draft wants features after layers {list(layers)}, "
                f"but the target has layers 0 to {num_layers - 1}"
            )
        return layers


class Eagle3Attention(nn.Module):
    """Projections only: queries, keys and values are made of 2E wide inputs."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim = config.width_of_head
        self.kv_heads = kv_heads
        self.q_proj = nn.Linear(2 * width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)


class Eagle3Layer(nn.Module):
    """The one decoder layer, with a norm for each half of its input."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Eagle3Attention(config)
        self.mlp = SwiGLU(width, config.intermediate_size)
        self.hidden_norm = RMSNorm(width, eps)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)


class Eagle3Network(nn.Module):
    """The head under its public tensor names; how rows attend is left to the caller."""

    d2t: Tensor

    def __init__(self, config: Eagle3Config, feature_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.fc = nn.Linear(feature_width, width, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        if config.draft_vocab_size is not None:
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.rotary = Rotary(config.width_of_head, config.theta)

    def inputs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What queries, keys and values are made of, ``[..., 2E]``."""
        layer = self.midlayer
        return torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), -1)

    def project(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of rows ``[..., 2E]``; one rotation for both."""
        attention = self.midlayer.self_attn
        together = torch.cat((attention.q_proj(inputs), attention.k_proj(inputs)), -1)
        rotated = self.rotary(together.unflatten(-1, (-1, attention.head_dim)), positions)
        values = attention.v_proj(inputs).unflatten(-1, (attention.kv_heads, attention.head_dim))
        return (
            rotated[..., : -attention.kv_heads, :],
            rotated[..., -attention.kv_heads :, :],
            values,
        )

    def keys_values(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values ``[..., H, D]`` of rows ``[..., 2E]``."""
        attention = self.midlayer.self_attn
        split = (attention.kv_heads, attention.head_dim)
        keys = attention.k_proj(inputs).unflatten(-1, split)
        return self.rotary(keys, positions), attention.v_proj(inputs).unflatten(-1, split)

    def queries(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries ``[..., H * G, D]`` of rows ``[..., 2E]``."""
        attention = self.midlayer.self_attn
        return self.rotary(
            attention.q_proj(inputs).unflatten(-1, (-1, attention.head_dim)), positions
        )

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output ``[..., E]`` before the final norm, which is what the chain feeds on."""
        layer = self.midlayer
        hidden = hidden + layer.self_attn.o_proj(attended.flatten(-2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@dataclass(slots=True)
class Eagle3State:
    """Draft KV cache by slot, and rows that were committed but not yet run through the draft."""

    keys_BHLD: Tensor
    values_BHLD: Tensor
    window: int | None
    lengths: list[int]
    pending: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


@DRAFTERS.register("eagle3")
class Eagle3Drafter:
    """EAGLE-3 heads in SafeAILab and SpecForge checkpoints, drafting a chain."""

    Settings: ClassVar = DrafterSettings

    def __init__(
        self,
        network: Eagle3Network,
        target: TargetInfo,
        num_draft_tokens: int,
        feature_layers: tuple[int, ...],
    ) -> None:
        self._network = network
        self._target = target
        self.num_draft_tokens = num_draft_tokens
        self.signal = SignalSpec(feature_layers=feature_layers, conditioning="chain")
        self._target_ids: Tensor | None = None
        if network.config.draft_vocab_size is not None:
            ids = network.d2t + torch.arange(len(network.d2t), device=network.d2t.device)
            if len(ids) != target.vocab_size or not torch.equal(
                ids, torch.arange(target.vocab_size, device=ids.device)
            ):
                self._target_ids = ids

    @classmethod
    def load(cls, settings: DrafterSettings, target: TargetInfo) -> Eagle3Drafter:
        """Read a checkpoint folder.

        Raises:
            CheckpointError: it is damaged, or does not fit the target.
        """
        directory = Path(settings.path)
        config = Eagle3Config.read(directory)
        for key, ours, theirs in (
            ("hidden_size", config.hidden_size, target.hidden_size),
            ("vocab_size", config.vocab_size, target.vocab_size),
        ):
            if ours != theirs:
                raise CheckpointError(
                    f"the draft {directory} has {key} {ours}, the target has {theirs}: "
                    f"this head was trained for another target"
                )
        layers = config.feature_layers(target.num_layers)
        network = Eagle3Network(config, len(layers) * target.hidden_size)
        tensors = read_tensors(directory)
        # SGLang replaces a checkpoint's own embedding by the target's, and so do we.
        tensors = {name: t for name, t in tensors.items() if name != "embed_tokens.weight"}
        check_tensors({n: t.shape for n, t in network.state_dict().items()}, tensors, directory)
        network.load_state_dict(tensors)
        if config.draft_vocab_size is not None:
            ids = network.d2t + torch.arange(len(network.d2t))
            if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size:
                raise CheckpointError(
                    f"d2t of {directory} points at tokens {int(ids.min())} to {int(ids.max())}, "
                    f"the target's vocabulary has {target.vocab_size}"
                )
        weight = target.embedding.weight
        network.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
        return cls(network, target, settings.num_draft_tokens, layers)

    @classmethod
    def initialise(
        cls,
        config: Eagle3Config,
        target: TargetInfo,
        num_draft_tokens: int,
    ) -> Eagle3Drafter:
        """A head with random weights and the whole vocabulary, to be trained from scratch."""
        layers = config.feature_layers(target.num_layers)
        network = Eagle3Network(config, len(layers) * target.hidden_size)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return cls(network, target, num_draft_tokens, layers)

    # --- serving ---------------------------------------------------------------------------

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> Eagle3State:
        config = self._network.config
        # The chain runs up to K positions past the last committed one.
        length = max_length + self.num_draft_tokens
        self._network.rotary.reserve(length)
        weight = self._network.fc.weight
        shape = (max_batch, config.num_key_value_heads, length, config.width_of_head)
        return Eagle3State(
            keys_BHLD=weight.new_zeros(shape),
            values_BHLD=weight.new_zeros(shape),
            window=window,
            lengths=[0] * max_batch,
            pending=[[] for _ in range(max_batch)],
        )

    def observe(
        self, state: Eagle3State, slot: int, tokens_R: Tensor, features_RF: Tensor | None
    ) -> None:
        assert features_RF is not None, "the engine must capture signal.feature_layers"
        state.pending[slot].append((tokens_R, features_RF))

    def move_slot(self, state: Eagle3State, source: int, destination: int) -> None:
        if source != destination:
            length = state.lengths[source]
            for cache in (state.keys_BHLD, state.values_BHLD):
                cache[destination, :, :length] = cache[source, :, :length]
            state.lengths[destination] = length
            state.pending[destination] = state.pending[source]
        state.lengths[source] = 0
        state.pending[source] = []

    @torch.no_grad()
    def propose(self, state: Eagle3State, num_slots: int, choose: Choose) -> Proposal:
        network, embedding = self._network, self._target.embedding
        last_rows = self._run_pending(state, num_slots)
        inputs, hidden = last_rows
        position_B = torch.tensor(
            [length - 1 for length in state.lengths[:num_slots]], device=hidden.device
        )
        slots_B = torch.arange(num_slots, device=hidden.device)
        queries = network.queries(inputs, position_B)
        tokens, logits = [], []
        for k in range(self.num_draft_tokens):
            if k:
                inputs = network.inputs(embedding(tokens[-1]), hidden)
                position_B = position_B + 1
                queries, keys, values = network.project(inputs, position_B)
                state.keys_BHLD[slots_B, :, position_B] = keys
                state.values_BHLD[slots_B, :, position_B] = values
            hidden = network.finish(hidden, self._attend(state, num_slots, queries, position_B, k))
            logits.append(self._logits_of_target(hidden))
            tokens.append(choose(k, logits[-1]))
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def _run_pending(self, state: Eagle3State, num_slots: int) -> tuple[Tensor, Tensor]:
        """Write the keys of all committed rows; returns inputs and hidden of each slot's newest."""
        network = self._network
        slots = state.pending[:num_slots]
        counts = [sum(len(tokens) for tokens, _ in rows) for rows in slots]
        starts = state.lengths[:num_slots]
        features = torch.cat([features for rows in slots for _, features in rows])
        tokens = torch.cat([tokens for rows in slots for tokens, _ in rows])
        positions = torch.cat(
            [
                torch.arange(start, start + count, device=tokens.device)
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        hidden = network.fc(features.to(network.fc.weight.dtype))
        inputs = network.inputs(self._target.embedding(tokens), hidden)
        keys, values = network.keys_values(inputs, positions)
        end = 0
        ends = []
        for slot, (start, count) in enumerate(zip(starts, counts, strict=True)):
            rows = slice(end, end + count)
            state.keys_BHLD[slot, :, start : start + count] = keys[rows].transpose(0, 1)
            state.values_BHLD[slot, :, start : start + count] = values[rows].transpose(0, 1)
            state.lengths[slot] = start + count
            state.pending[slot] = []
            end += count
            ends.append(end - 1)
        return inputs[ends], hidden[ends]

    def _attend(
        self,
        state: Eagle3State,
        num_slots: int,
        queries_BJD: Tensor,
        position_B: Tensor,
        step: int,
    ) -> Tensor:
        """Attention of one row a slot over its cache, ``[B, H * G, D]``."""
        newest = [length - 1 + step for length in state.lengths[:num_slots]]
        end = max(newest) + 1
        begin = max(0, min(newest) + 1 - state.window) if state.window else 0
        keys = state.keys_BHLD[:num_slots, :, begin:end]
        values = state.values_BHLD[:num_slots, :, begin:end]
        mask = None
        if num_slots > 1:
            at = torch.arange(begin, end, device=position_B.device)
            visible = at <= position_B[:, None]
            if state.window:
                visible &= at > position_B[:, None] - state.window
            mask = visible[:, None, None]
        attended = F.scaled_dot_product_attention(
            queries_BJD.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=True
        )
        return attended.squeeze(2)

    def _logits(self, hidden: Tensor) -> Tensor:
        network = self._network
        head = network.lm_head if network.config.draft_vocab_size else self._target.head
        return head(network.norm(hidden))

    def _logits_of_target(self, hidden_BE: Tensor) -> Tensor:
        """Float32 logits over the target's vocabulary; what the draft cannot say is -inf."""
        logits = self._logits(hidden_BE).float()
        if self._target_ids is None:
            return logits
        full = logits.new_full((len(logits), self._target.vocab_size), float("-inf"))
        return full.index_copy_(1, self._target_ids, logits)

    # --- learning --------------------------------------------------------------------------

    def network(self) -> Eagle3Network:
        return self._network

    def trainable(self, scope: str) -> Sequence[str]:
        names = [name for name, _ in self._network.named_parameters()]
        scopes = {"full": names, "body": [n for n in names if not n.startswith("lm_head.")]}
        if scope not in scopes:
            raise ConfigError(
                f"adapt.scope.kind is {scope!r}; the eagle3 drafter has {', '.join(scopes)}"
            )
        return scopes[scope]

    def clone(self, dtype: torch.dtype) -> Eagle3Drafter:
        network = copy.deepcopy(self._network).to(dtype)
        return Eagle3Drafter(
            network, self._target, self.num_draft_tokens, self.signal.feature_layers
        )

    def target_ids(self) -> Tensor | None:
        return self._target_ids

    def replay(self, batch: SignalBatch) -> Tensor:
        """Chains from many anchors at once: step-0 keys of the context, then each its own.

        Step s of an anchor sees the context rows before the anchor and the s rows it drafted
        itself (training-time test, EAGLE-3, arXiv 2503.01840).
        """
        assert batch.features_RCF is not None, "an EAGLE-3 batch carries features"
        network, embedding = self._network, self._target.embedding
        dtype = network.fc.weight.dtype
        num_rows, steps = batch.features_RCF.shape[1], batch.paths_RNK.shape[-1]
        at_C = torch.arange(num_rows, device=batch.anchors_RN.device)
        position_RC = batch.starts_R[:, None] + at_C
        network.rotary.reserve(int(batch.starts_R.max()) + num_rows + steps)

        hidden_RCE = network.fc(batch.features_RCF.to(dtype))
        inputs_RCX = network.inputs(_embed(embedding, batch.tokens_RC1[:, 1:], dtype), hidden_RCE)
        keys_RCHD, values_RCHD = network.keys_values(inputs_RCX, position_RC)

        row_RN = batch.anchors_RN - 1  # the newest row whose features the anchor may use
        hidden, inputs = _gather(hidden_RCE, row_RN), _gather(inputs_RCX, row_RN)
        position_RN = batch.starts_R[:, None] + row_RN
        queries = network.queries(inputs, position_RN)
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        logits = []
        for step in range(steps):
            if step:
                drafted_RN = batch.paths_RNK[..., step - 1]
                inputs = network.inputs(_embed(embedding, drafted_RN, dtype), hidden)
                position_RN = position_RN + 1
                queries, keys, values = network.project(inputs, position_RN)
                own_keys.append(keys)
                own_values.append(values)
            visible_RNC = at_C <= row_RN[..., None]
            if batch.window is not None:
                visible_RNC = visible_RNC & (at_C > row_RN[..., None] + step - batch.window)
            attended = _chain_attention(
                queries, keys_RCHD, values_RCHD, visible_RNC, own_keys, own_values
            )
            hidden = network.finish(hidden, attended)
            logits.append(self._logits(hidden))
        return torch.stack(logits, 2)

    def save(self, directory: Path) -> None:
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": str(self._network.fc.weight.dtype).removeprefix("torch."),
            **msgspec.to_builtins(self._network.config),
        }
        config["rope_theta"] = self._network.config.theta
        config = {key: value for key, value in config.items() if value is not None}
        config["draft_vocab_size"] = self._network.config.draft_vocab_size  # SGLang needs the key
        write_checkpoint(directory, config, self._network.state_dict())


def _embed(embedding: nn.Embedding, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings of the target, which training must not reach."""
    return embedding(tokens).detach().to(dtype)


def _gather(rows_RCX: Tensor, index_RN: Tensor) -> Tensor:
    """``[R, N, X]``: rows of each request by index."""
    index = index_RN[..., None].expand(-1, -1, rows_RCX.shape[-1])
    return rows_RCX.gather(1, index)


def _chain_attention(
    queries_RNJD: Tensor,
    keys_RCHD: Tensor,
    values_RCHD: Tensor,
    visible_RNC: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
) -> Tensor:
    """Attention of each anchor over the shared context and over the rows it drafted itself."""
    kv_heads, head_dim = keys_RCHD.shape[-2:]
    queries = queries_RNJD.unflatten(2, (kv_heads, -1)) * head_dim**-0.5
    scores = torch.einsum("rnhgd,rchd->rnhgc", queries, keys_RCHD)
    scores = scores.masked_fill(~visible_RNC[:, :, None, None], float("-inf"))
    if own_keys:
        own = torch.einsum("rnhgd,rnshd->rnhgs", queries, torch.stack(own_keys, 2))
        scores = torch.cat((scores, own), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(queries.dtype)
    context = keys_RCHD.shape[1]
    attended = torch.einsum("rnhgc,rchd->rnhgd", weights[..., :context], values_RCHD)
    if own_values:
        attended = attended + torch.einsum(
            "rnhgs,rnshd->rnhgd", weights[..., context:], torch.stack(own_values, 2)
        )
    return attended.flatten(2, 3)
