"""What the families' ``config.json`` files have in common: the shape of a decoder layer, and RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
from torch import Tensor

from cosched.errors import CheckpointError
from drafters.raw_keys import check_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosched.protocols import TargetInfo

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on how long the text has become."""

ROPE_KEYS = frozenset({
    "rope_type", "rope_theta", "factor", "partial_rotary_factor",
    "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "mrope_section",
    "mrope_interleaved", "finetuned",
})  # fmt: skip
"""What a rotary embedding may be told; the sections of ``mrope`` say nothing to a text."""

ROPE_NUMBERS = frozenset({
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
})  # fmt: skip
ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}

C = TypeVar("C", bound="DecoderConfig")


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Keys that transformers gives a Llama or Qwen decoder; a family adds its own in a subclass."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_hidden_layers: int = 1
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    partial_rotary_factor: float | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE as transformers 5 writes it, whichever way the file does: with ``rope_theta`` inside."""
        rope = {**(self.rope_scaling or {}), **(self.rope_parameters or {})}
        older = rope.pop("type", None)  # its name before transformers 4.43; the newer one wins
        rope["rope_type"] = rope.get("rope_type") or older or "default"
        if rope["rope_type"] == "mrope":  # of text, all sections are at the same position
            rope["rope_type"] = "default"
        if self.rope_theta is not None:
            rope.setdefault("rope_theta", self.rope_theta)
        return {"rope_theta": 10000.0, **rope}

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed per head: that is what makes a layer Qwen3's."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    def window_of_layer(self, layer: int) -> int | None:
        """How many positions back a layer of type ``sliding_attention`` sees, itself included."""
        types = self.layer_types or []
        sliding = layer < len(types) and types[layer] == "sliding_attention"
        return self.sliding_window if sliding and self.use_sliding_window is not False else None

    @property
    def windows(self) -> list[int | None]:
        """``window_of_layer`` of each layer."""
        return [self.window_of_layer(layer) for layer in range(self.num_hidden_layers)]

    def inverse_frequencies(self) -> tuple[Tensor, float]:
        """RoPE angles per position ``[D / 2]`` in float64, and the factor on cosine and sine."""
        rope = self.rope
        exponent = torch.arange(0, self.width_of_head, 2, dtype=torch.float64) / self.width_of_head
        plain = float(rope["rope_theta"]) ** -exponent
        if rope["rope_type"] == "default":
            return plain, 1.0
        if rope["rope_type"] == "linear":
            return plain / float(rope["factor"]), 1.0
        # transformers has the formulas of the rest; imported late, it takes seconds.
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.width_of_head,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=rope,
        )
        scaled, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return scaled.double(), float(factor)

    def layers_of(self, num_layers: int, model_type: str = "") -> tuple[int, ...]:
        """Target layers whose outputs the draft sees: 'after that layer', 0-based.

        ``model_type`` is the target's, where it is known: some ids mean another thing by it.
        """
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """How many target layers the draft sees."""
        raise NotImplementedError

    @property
    def target_width(self) -> int:
        """Hidden size of the target that the draft was trained for."""
        return self.hidden_size

    def problems(self) -> list[str]:
        """What this configuration asks for and the shared layers do not do."""
        found: list[str] = []
        if self.rope["rope_type"] not in ROPE_TYPES:
            found.append(
                f"rope_type {self.rope['rope_type']!r} (implemented: {', '.join(ROPE_TYPES)})"
            )
        if any(isinstance(value, dict) for value in self.rope.values()):
            found.append("rope_parameters for each type of layer")
        else:
            found += [
                f"{key} = {value!r} in its rope parameters (implemented: {', '.join(sorted(ROPE_KEYS))})"
                for key, value in self.rope.items()
                if key not in ROPE_KEYS and value is not None
            ]
        found += self._rope_numbers()
        factor = self.rope.get("partial_rotary_factor", self.partial_rotary_factor)
        if factor not in {None, 1.0}:
            found.append(f"partial_rotary_factor {factor}")
        if self.hidden_act != "silu":
            found.append(f"hidden_act {self.hidden_act!r} (implemented: silu)")
        if self.mlp_bias:
            found.append("mlp_bias")
        if self.num_attention_heads % self.kv_heads:
            found.append(
                f"{self.num_attention_heads} heads over {self.kv_heads} key-value heads, "
                f"which do not divide them"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            found.append("no head_dim, and num_attention_heads does not divide hidden_size")
        types = self.layer_types
        if types is not None:
            if len(types) < self.num_hidden_layers:
                found.append(f"{len(types)} layer_types for {self.num_hidden_layers} layers")
            found += [
                f"layer type {kind!r} (implemented: full_attention, sliding_attention)"
                for kind in sorted(set(types) - {"full_attention", "sliding_attention"})
            ]
            off = self.use_sliding_window is False  # then transformers forgets the window
            if "sliding_attention" in types and (off or not self.sliding_window):
                found.append("layer type 'sliding_attention' without a sliding_window")
        return found

    def _rope_numbers(self) -> list[str]:
        """What its angles cannot be computed from."""
        rope, kind = self.rope, self.rope["rope_type"]
        found = [
            f"{key} = {value!r} in its rope parameters (a number above 0 is allowed)"
            for key, value in rope.items()
            if key in ROPE_NUMBERS
            and (value is not None or key == "rope_theta")
            and not _is_positive(value)
        ]
        found += [
            f"rope_type {kind!r} without {key}"
            for key in ROPE_NEEDS.get(str(kind), ())
            if rope.get(key) is None
        ]
        if self.width_of_head % 2:
            found.append(f"head_dim {self.width_of_head}: rotary embeddings turn pairs")
        if not _is_positive(self.rms_norm_eps):
            found.append(f"rms_norm_eps {self.rms_norm_eps}")
        return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def convert_config(raw: Mapping[str, Any], cls: type[C], where: object) -> C:
    """A family's configuration from the keys of its file, which were checked by their names.

    Raises:
        CheckpointError: a key is missing or mistyped, or asks for what is not implemented.
    """
    try:
        config = msgspec.convert({**raw, "layer_types": _layer_types(raw)}, cls)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {error}") from error
    check_sizes({name: getattr(config, name) for name in config.__struct_fields__}, where)
    if problems := config.problems():
        raise CheckpointError(
            f"{where} asks for what is not implemented, and loading it anyway would draft badly "
            f"in silence:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return config


def _layer_types(raw: Mapping[str, Any]) -> Any:
    """``layer_types``, or what Qwen's configurations derive where a file leaves them out."""
    types, window = raw.get("layer_types"), raw.get("sliding_window")
    derived = str(raw.get("model_type", "qwen3")).startswith("qwen")
    if types is not None or not (derived and window and raw.get("use_sliding_window")):
        return types
    full, number = raw.get("max_window_layers"), int(raw.get("num_hidden_layers", 1))
    first = 28 if full is None else int(full)  # transformers' default
    return ["full_attention" if i < first else "sliding_attention" for i in range(number)]


def small_layer(target: TargetInfo, model_type: str) -> dict[str, Any]:
    """Keys of a small layer of that type over a target: what examples of drafters are made of."""
    return {
        "model_type": model_type,
        "hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": target.vocab_size,
    }
