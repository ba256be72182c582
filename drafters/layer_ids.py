"""Whose layer ids mean what: the one place where the conventions of all formats meet.

Ours is "after that layer", counted from 0; n, the number of layers, is "after the final norm".

| written by | an id i is | ours |
| --- | --- | --- |
| z-lab, SpecForge and SGLang for DFlash | after layer i | i |
| speculators | transformers' ``hidden_states[i]``, before layer i | i - 1 |
| AMD for PARD-2 | the same, where -1 is the last, after the norm | i - 1, and n for the last |
| ``eagle_config`` of EAGLE-3, read by SGLang | after layer i, but see ``of_eagle_config`` | i or i - 1 |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Targets whose classes in SGLang (0.5.20 to 0.5.23, set_eagle3_layers_to_capture) read ids otherwise.
BY_FIRST_ID = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite", "glm_moe_dsa",
)  # fmt: skip
BY_LARGEST_ID = ("gpt_oss",)


def of_eagle_config(ids: Sequence[int], num_layers: int, model_type: str) -> list[int]:
    """``eagle_aux_hidden_state_layer_ids`` of a head for a target of that type and depth.

    SGLang counts "after that layer" (i + 1 is the layer whose input it takes), with two exceptions:
    where a gpt-oss target has the largest id as its number of layers, and where a DeepSeek has
    another first id than 1, ids are boundaries: i is before layer i.

    Raises:
        CheckpointError: ids are boundaries, and SGLang would not read them so for this target.
    """
    boundaries = max(ids) == num_layers
    if model_type in BY_FIRST_ID:
        before = ids[0] != 1
    else:
        before = boundaries and model_type in BY_LARGEST_ID
    if boundaries and not before:
        raise CheckpointError(
            f"the draft wants features after layers {list(ids)}, but the target has layers 0 to "
            f"{num_layers - 1}; ids that count boundaries, of which {num_layers} is the last, are "
            f"read so for {', '.join(BY_LARGEST_ID)} targets, as SGLang does, and this one is "
            f"{model_type or 'of no known type'}"
        )
    return [i - 1 for i in ids] if before else list(ids)


def eagle3_default(num_layers: int, model_type: str) -> tuple[int, int, int]:
    """The layers of a head that names none: before 2, n / 2 and n - 3, as in SafeAILab's code.

    MiniMax-M3 with its vision part takes those after them, as its class in SGLang does.
    """
    if model_type == "minimax_m3_vl":
        return 2, num_layers // 2, num_layers - 3
    return 1, num_layers // 2 - 1, num_layers - 4


def dflash_default(num_layers: int, count: int) -> list[int]:
    """z-lab's default: layer n / 2 for one, else evenly from 1 to n - 3, rounded half to even."""
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


def from_hidden_states(ids: Sequence[int]) -> list[int]:
    """Ours, of indices into transformers' ``hidden_states`` (speculators)."""
    return [i - 1 for i in ids]


def to_hidden_states(ids: Sequence[int]) -> list[int]:
    """Indices into transformers' ``hidden_states`` (speculators), of ours."""
    return [i + 1 for i in ids]


def of_pard2(ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Ours, of ``pard2_target_layers``.

    Raises:
        CheckpointError: the target does not have them, or one is named twice.
    """
    states = num_layers + 1
    layers = tuple((i if i >= 0 else states + i) for i in ids)
    if len(set(layers)) != len(layers) or not all(1 <= i <= num_layers for i in layers):
        raise CheckpointError(
            f"the draft wants pard2_target_layers {list(ids)}, "
            f"but the target has hidden states 1 to {num_layers} behind its embedding"
        )
    return tuple(i if i == num_layers else i - 1 for i in layers)


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The layers, if a target of ``num_layers`` has each of them, and none is named twice.

    Raises:
        CheckpointError: it has not.
    """
    if not all(0 <= i < num_layers for i in layers):
        raise CheckpointError(
            f"the draft wants features after layers {list(layers)}, "
            f"but the target has layers 0 to {num_layers - 1}"
        )
    if len(set(layers)) != len(layers):
        raise CheckpointError(f"the draft wants features after layers {list(layers)}, one twice")
    return layers
