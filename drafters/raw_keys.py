"""Keys of a ``config.json`` that are looked at before the file is typed: what they may be, whatever family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST = {
    "hidden_size": 1 << 20,
    "target_hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "draft_vocab_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "num_target_layers": 1 << 10,
    "block_size": 1 << 14,
    "pard2_target_dim": 1 << 24,
}
"""Far more than any model has; what a file asks for is made of these numbers before a weight is read."""


class RawKeys(msgspec.Struct):
    """Other keys have their types where they are read."""

    architectures: list[str] | None = None
    model_type: str | None = None
    layer_types: list[str] | None = None
    num_hidden_layers: int | None = None
    max_window_layers: int | None = None
    sliding_window: int | None = None
    eagle_config: dict[str, Any] | None = None
    dflash_config: dict[str, Any] | None = None
    transformer_layer_config: dict[str, Any] | None = None
    speculators_config: dict[str, Any] | None = None
    speculators_model_type: str | None = None
    aux_hidden_state_layer_ids: list[int] | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None


def check_raw(raw: Mapping[str, Any], where: object) -> None:
    """Make sure that these keys are what their formats have.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    nested = raw.get("transformer_layer_config")
    for keys in (raw, nested) if isinstance(nested, dict) else (raw,):
        try:
            msgspec.convert(keys, RawKeys)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{where}: {error}") from error
        check_sizes(keys, where)


def check_sizes(keys: Mapping[str, Any], where: object) -> None:
    """Refuse sizes that no model has.

    Raises:
        CheckpointError: one is not positive, or too large; the message names it.
    """
    for name, most in MOST.items():
        value = keys.get(name)
        if isinstance(value, int) and not 1 <= value <= most:
            raise CheckpointError(f"{where}: {name} {value} (1 to {most} is allowed)")


def architectures_of(raw: Mapping[str, Any]) -> list[str]:
    """The classes that a file names, of a file that may be any."""
    named = raw.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []
