"""DFlash checkpoints of z-lab (also SpecForge's and SGLang's) and of speculators.

| | ``zlab``, ``sglang``, ``specforge`` | ``speculators`` |
| --- | --- | --- |
| shape of the layers | top level | under ``transformer_layer_config`` |
| feature layers | ``dflash_config.target_layer_ids``, "after that layer" | ``aux_hidden_state_layer_ids``, one more |
| block, mask | top level or ``dflash_config`` | top level |
| vocabulary | the target's | ``draft_vocab_size``, with its own head and maps where it is reduced |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cosched.errors import CheckpointError
from drafters.checkpoint import (
    VERIFIERS_OWN,
    Checkpoint,
    completed,
    first_form,
    read_config,
    read_saved,
    read_tensors,
    rename,
    speculators_block,
    write_checkpoint,
)
from drafters.config import convert_config
from drafters.dflash.config import DFlashConfig
from drafters.keys import LAYER_KEYS, KeyTable, refuse_unknown
from drafters.layer_ids import from_hidden_states, to_hidden_states
from drafters.raw_keys import architectures_of
from drafters.vocabulary import complete_maps

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cosched.protocols import DrafterSettings

FORMATS = ("zlab", "sglang", "specforge", "speculators")
EMBEDDING = "embed_tokens.weight"
MASK_FILE, MASK_EMBEDDING = "mask_embedding.pt", "mask_embedding"
NAMES = {"model.": "", "encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
BORROWED = (EMBEDDING, "lm_head.weight")  # at most copies of the target's
# Options of later relatives (DFlash2, Domino, MiMo …) that change the arithmetic, where they are off.
SUCCESSORS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "attention_value_scale": (),
    "projector_type": (),
    "conv_kernel_size": (0,),
    "conv_group_size": (0,),
    "selector_rank": (0,),
    "selector_top_k": (0,),
}
BLOCK_KEYS = frozenset({"block_size", "mask_token_id", "mask_token", "target_layer_ids"})
FLAT_KEYS = KeyTable(
    read=LAYER_KEYS | BLOCK_KEYS | {"dflash_config", "num_target_layers"},
    harmless={"tie_word_embeddings", "draft_vocab_size"},  # embedding and head are the target's
    only=SUCCESSORS,
)
NESTED_KEYS = KeyTable(read=BLOCK_KEYS | {"num_target_layers"}, only=SUCCESSORS)
SPECULATORS_KEYS = KeyTable(
    read={
        "speculators_model_type", "speculators_config", "transformer_layer_config",
        "draft_vocab_size", "target_hidden_size", "block_size", "mask_token_id",
        "aux_hidden_state_layer_ids", "sliding_window_non_causal", "sample_from_anchor",
    },
    harmless={"speculators_version", "embed_requires_grad", "tie_word_embeddings", "model_type"},
)  # fmt: skip
LAYER_CONFIG_KEYS = KeyTable(read=LAYER_KEYS, harmless={"tie_word_embeddings"})


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a DFlash draft."""
    if "speculators_model_type" in raw:
        return raw["speculators_model_type"] == "dflash"
    return "DFlashDraftModel" in architectures_of(raw) or "dflash_config" in raw


def not_for_sglang(config: DFlashConfig, names: frozenset[str]) -> list[str]:
    """Why stock SGLang would not run this draft as it is; empty where it would."""
    del names
    return unfit(config, "sglang")


def read_shape(
    directory: Path, settings: DrafterSettings | None = None
) -> tuple[DFlashConfig, str, dict[str, Any]]:
    """Configuration, format, and the file itself, without weights.

    Raises:
        CheckpointError: a key is missing or mistyped, or asks for what is not implemented.
    """
    del settings  # these files say everything themselves
    raw = read_config(directory)
    where = directory / "config.json"
    if "speculators_model_type" in raw or "speculators_config" in raw:
        return _from_speculators(raw, where), "speculators", raw
    nested = raw.get("dflash_config") or {}
    both = {**raw, **nested}
    if "aux_hidden_state_layer_ids" in both:
        raise CheckpointError(
            f"{where} has aux_hidden_state_layer_ids, which only speculators files have (they "
            f"count one more); give dflash_config.target_layer_ids, 'after that layer'"
        )
    found = FLAT_KEYS.problems(raw) + NESTED_KEYS.problems(nested, "dflash_config.")
    refuse_unknown(where, found)
    keys: dict[str, Any] = {**raw, "feature_layers": both.get("target_layer_ids")}
    for key in ("block_size", "mask_token_id", "mask_token", "num_target_layers"):
        if both.get(key) is not None:
            keys[key] = both[key]
    keys.pop("draft_vocab_size", None)  # this format has none
    keys["sliding_causal"] = both.get("is_causal") is None  # false frees sliding layers, too
    return convert_config(keys, DFlashConfig, where), "zlab", raw


def _from_speculators(raw: Mapping[str, Any], where: Path) -> DFlashConfig:
    if (kind := raw.get("speculators_model_type", "dflash")) != "dflash":
        raise CheckpointError(f"{where} is a speculators {kind!r} model, not 'dflash'")
    if raw.get("sample_from_anchor"):
        raise CheckpointError(
            f"{where} has sample_from_anchor: a block that drafts from its anchor as well is DSpark, "
            f"which the dflash drafter does not implement"
        )
    layer = raw.get("transformer_layer_config") or {}
    found = SPECULATORS_KEYS.problems(raw)
    found += LAYER_CONFIG_KEYS.problems(layer, "transformer_layer_config.")
    keys = completed(layer)
    if raw.get("target_hidden_size") not in {None, keys.get("hidden_size")}:
        found.append(
            f"target_hidden_size = {raw['target_hidden_size']}: it is another than its own"
        )
    refuse_unknown(where, found)
    keys["block_size"] = raw.get("block_size", 8)
    keys["mask_token_id"] = raw.get("mask_token_id")
    keys["sliding_causal"] = not raw.get("sliding_window_non_causal", False)
    keys["window_from"] = "anchor"
    ids = raw.get("aux_hidden_state_layer_ids")
    if not ids:
        raise CheckpointError(
            f"{where} has no aux_hidden_state_layer_ids; speculators' default for them is not that "
            f"of DFlash, so say which layers the draft was trained on"
        )
    keys["feature_layers"] = from_hidden_states(ids)
    reduced = raw.get("draft_vocab_size", 32000)
    keys["draft_vocab_size"] = None if reduced == keys.get("vocab_size") else reduced
    return convert_config(keys, DFlashConfig, where)


def read(directory: Path, settings: DrafterSettings | None = None) -> Checkpoint[DFlashConfig]:
    """A whole checkpoint in our own terms.

    Raises:
        CheckpointError: as ``read_shape``, or the weights cannot be read.
    """
    config, form, raw = read_shape(directory, settings)
    tensors = {n: t for n, t in read_tensors(directory).items() if n not in VERIFIERS_OWN}
    if (directory / MASK_FILE).exists():
        tensors[MASK_EMBEDDING] = _read_mask(directory / MASK_FILE, config.mask_token_id)
    tensors = rename(tensors, NAMES)
    tensors = complete_maps(tensors, config.draft_vocab_size, config.vocab_size)
    return Checkpoint(config, tensors, form, raw)


def _read_mask(path: Path, mask_token_id: int | None) -> Tensor:
    """A trained mask embedding. SGLang writes it into the target's table; here the draft keeps it.

    Raises:
        CheckpointError: it is damaged, of another mask token, or one for each place.
    """
    saved = read_saved(path)
    if saved.get("per_position"):
        raise CheckpointError(f"{path} has an embedding for each place; the dflash drafter has one")
    embedding, token = saved.get("embedding"), saved.get("mask_token_id")
    if not isinstance(embedding, Tensor) or embedding.numel() != embedding.shape[-1]:
        raise CheckpointError(f"{path} has no embedding of one token")
    if mask_token_id is not None and token != mask_token_id:
        raise CheckpointError(
            f"{path} is of mask token {token}, config.json says mask_token_id {mask_token_id}"
        )
    return embedding.flatten()


def write(checkpoint: Checkpoint[DFlashConfig], directory: Path, form: str) -> None:
    """Write in a format.

    Raises:
        CheckpointError: the format cannot express this draft.
    """
    if problems := unfit(checkpoint.config, form):
        raise CheckpointError(
            f"this draft cannot be written for {form}:\n" + "\n".join(f"  {p}" for p in problems)
        )
    tensors = dict(checkpoint.tensors)
    embedding = tensors.pop(MASK_EMBEDDING, None)
    if embedding is not None and form == "speculators":
        raise CheckpointError("a mask embedding of its own cannot be written for speculators")
    make = _to_speculators if form == "speculators" else _to_zlab
    saved: dict[str, dict[str, Any]] = {}
    if embedding is not None:
        token = checkpoint.config.mask_token_id
        saved[MASK_FILE] = {"embedding": embedding.detach().cpu().clone(), "mask_token_id": token}
    write_checkpoint(directory, make(checkpoint), tensors, saved)


def unfit(config: DFlashConfig, form: str) -> list[str]:
    """Why a format, or the program that reads it, cannot have this draft; empty where it can."""
    if form not in FORMATS:
        raise CheckpointError(f"dflash has no format {form!r}; there are: {', '.join(FORMATS)}")
    problems: list[str] = []
    sliding = "sliding_attention" in (config.layer_types or [])
    if form == "speculators":
        if config.feature_layers is None and config.num_target_layers is None:
            problems.append("neither feature layers nor num_target_layers, from which they follow")
        if config.mask_token_id is None:
            problems.append("no mask_token_id, only a token's name")
        if sliding and config.window_from != "anchor":
            problems.append("sliding_attention windows of each row: there they end at the anchor")
        return problems
    if config.draft_vocab_size is not None:
        problems.append(
            f"a reduced vocabulary of {config.draft_vocab_size}: SGLang and SpecForge draft with the "
            f"target's head"
        )
    if sliding and not config.sliding_causal and form == "specforge":
        problems.append("bidirectional sliding_attention layers: there they are causal")
    layers = config.feature_layers or []
    if layers != sorted(layers):
        problems.append(f"feature layers {layers}: SGLang fuses them in the target's order")
    if sliding and config.window_from != "row":
        problems.append("sliding_attention windows from the anchor: there each row has its own")
    return problems


SHAPE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "num_hidden_layers", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias",
    "layer_types", "sliding_window",
)  # fmt: skip


def first_fit(config: DFlashConfig) -> str:
    """The format that a draft which was never in any is written in: the first that can."""
    return first_form(FORMATS, lambda form: unfit(config, form))


def _layer_keys(config: DFlashConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {key: getattr(config, key) for key in SHAPE_KEYS}
    keys["num_key_value_heads"], keys["head_dim"] = config.kv_heads, config.width_of_head
    if "sliding_attention" in (config.layer_types or []):
        keys["use_sliding_window"] = True  # without it transformers forgets the window
    return {key: value for key, value in keys.items() if value is not None}


def _to_zlab(checkpoint: Checkpoint[DFlashConfig]) -> dict[str, Any]:
    config, rope = checkpoint.config, checkpoint.config.rope
    kept = checkpoint.raw if checkpoint.format != "speculators" else {}
    nested = dict(kept.get("dflash_config") or {})
    if config.mask_token_id is not None:
        nested["mask_token_id"] = config.mask_token_id
    else:
        nested["mask_token"] = config.mask_token
    if config.feature_layers:
        nested["target_layer_ids"] = config.feature_layers
    keys: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "tie_word_embeddings": False,
        **kept,
        **_layer_keys(config),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.keys() == {"rope_type", "rope_theta"} else rope,
        "layer_types": config.layer_types or ["full_attention"] * config.num_hidden_layers,
        "block_size": config.block_size,
        "dflash_config": nested,
    }
    if config.num_target_layers is not None:
        keys["num_target_layers"] = config.num_target_layers
    if not config.sliding_causal:
        keys["is_causal"] = False
    keys.pop("auto_map", None)  # of code that does not come along
    return keys


def _to_speculators(checkpoint: Checkpoint[DFlashConfig]) -> dict[str, Any]:
    config = checkpoint.config
    kept = checkpoint.raw if checkpoint.format == "speculators" else {}
    layer = {**_layer_keys(config), "rope_parameters": config.rope}
    ids = config.layers_of(config.num_target_layers or 1 + max(config.feature_layers or [0]))
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_config": speculators_block("dflash", config.block_size - 1),
        **kept,
        "speculators_model_type": "dflash",
        "transformer_layer_config": {**kept.get("transformer_layer_config", {}), **layer},
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": to_hidden_states(ids),
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": not config.sliding_causal,
        "sample_from_anchor": False,
    }
