"""EAGLE-3 checkpoints of SafeAILab, SpecForge, SGLang (one flat format) and speculators.

| | flat (``sglang``, ``specforge``) | ``speculators`` |
| --- | --- | --- |
| layer tensors | ``midlayer.*`` | ``layers.0.*`` |
| shape of the layer | top level | under ``transformer_layer_config`` |
| feature layers | ``eagle_config``, "after that layer" | top level, one more than that |
| ``norm_output`` | see ``norm_output_of`` | the normed state is fed back |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

from cosched.errors import CheckpointError
from drafters.checkpoint import (
    VERIFIERS_OWN,
    Checkpoint,
    completed,
    first_form,
    read_config,
    read_tensors,
    rename,
    speculators_block,
    tensor_names,
    write_checkpoint,
)
from drafters.config import convert_config
from drafters.eagle3.config import Eagle3Config
from drafters.eagle3.keys import NORM_OUTPUT, flat_problems, speculators_problems
from drafters.keys import refuse_unknown
from drafters.layer_ids import from_hidden_states, to_hidden_states
from drafters.raw_keys import architectures_of
from drafters.vocabulary import complete_maps, without_identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from cosched.protocols import DrafterSettings


FORMATS = ("sglang", "specforge", "speculators")
NormOutput = Literal["fed_back", "before_head"]

FLAT_NAMES = {
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
SPECULATORS_NAMES = {"layers.0.": "midlayer."}
ANEW = "cosched convert writes it as SGLang reads it"
HEAD, FUSION_BIAS = "lm_head.weight", "fc.bias"


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of an EAGLE-3 head."""
    if "speculators_model_type" in raw:
        return raw["speculators_model_type"] == "eagle3"
    return any("eagle3" in name.lower() for name in architectures_of(raw))


def not_for_sglang(config: Eagle3Config, names: frozenset[str]) -> list[str]:
    """Why stock SGLang would not run a head of these tensors as it is; empty where it would."""
    unfitting = unfit(config, "sglang", own_embedding="embed_tokens.weight" in names)
    return [*config.misread, *unfitting]


def read_shape(
    directory: Path, settings: DrafterSettings | None = None
) -> tuple[Eagle3Config, str, dict[str, Any]]:
    """Configuration, format, and the file itself, without weights.

    Raises:
        CheckpointError: a key is missing, mistyped, ambiguous, or asks for what is not implemented.
    """
    raw = read_config(directory)
    where = directory / "config.json"
    if "speculators_model_type" in raw or "speculators_config" in raw:
        return _from_speculators(raw, where), "speculators", raw
    keys = dict(raw)
    if "eagle_aux_hidden_state_layer_ids" in raw:
        raise CheckpointError(
            f"{where} has eagle_aux_hidden_state_layer_ids at the top level, where SGLang ignores "
            f"it; say which layers are meant under eagle_config (ids there mean 'after that layer')"
        )
    nested = raw.get("eagle_config") or {}
    refuse_unknown(where, flat_problems(raw))
    keys["feature_layers"] = nested.get("eagle_aux_hidden_state_layer_ids")
    keys["ids_by_target"] = True
    keys["norm_before_fc"] = bool(nested.get("norm_before_fc", raw.get("norm_before_fc", False)))
    keys["fc_norm"] = bool(raw.get("fc_norm") or raw.get("use_aux_norm"))
    keys["norm_output"] = _norm_output_of(raw, where, getattr(settings, "norm_output", None))
    config = convert_config(keys, Eagle3Config, where)
    if problems := unfit(config, "sglang"):
        raise CheckpointError(
            f"{where} asks for what no reader of its format does:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    if raw.get("num_aux_hidden_states", config.num_features) != config.num_features:
        raise CheckpointError(
            f"{where}: num_aux_hidden_states is {raw['num_aux_hidden_states']}, and eagle_config "
            f"does not say which {raw['num_aux_hidden_states']} layers they come from"
        )
    return _as_its_tensors_say(config, tensor_names(directory)), "sglang", raw


def _as_its_tensors_say(config: Eagle3Config, names: frozenset[str] | None) -> Eagle3Config:
    """What the names of a flat file's tensors tell and its ``config.json`` does not.

    SGLang would draft with what happens to be in memory where a head is not in the file, unless
    ``draft_vocab_size`` is null, and without a bias that ``bias`` does not announce.
    """
    if names is None:
        return config
    names = frozenset(name.removeprefix("model.") for name in names)
    size = config.draft_vocab_size
    if HEAD not in names and size == config.vocab_size:
        said = (
            f"draft_vocab_size {size} and no {HEAD}: SGLang borrows the target's head only where "
            f"draft_vocab_size is null; {ANEW}"
        )
        borrowing = {"draft_vocab_size": None, "misread": (*config.misread, said)}
        config = msgspec.structs.replace(config, **borrowing)
    if FUSION_BIAS in names and not config.bias:
        said = (
            f"{FUSION_BIAS}: SGLang leaves it out where config.json does not say bias: true; {ANEW}"
        )
        config = msgspec.structs.replace(config, bias=True, misread=(*config.misread, said))
    for theirs, ours in _upper_norms(config).items():
        if f"{theirs}weight" in names and f"{ours}weight" not in names:
            said = f"{theirs}weight: SGLang norms this layer by {ours}weight, and has ones for it; {ANEW}"
            config = msgspec.structs.replace(config, misread=(*config.misread, said))
    return config


def _norm_output_of(raw: Mapping[str, Any], where: Path, said: NormOutput | None) -> bool:
    """Whether the normed state is fed back, of a flat file.

    SGLang's ``norm_output`` feeds the normed state back, SpecForge's norms before the head (and
    never feeds back): one key, two heads that differ by 70 % of the largest logit at the second
    step. A file that has the key must be told apart by whoever knows where it came from.
    """
    if "norm_output" not in raw:
        return False
    said = said or raw.get(NORM_OUTPUT)
    if said is None:
        raise CheckpointError(
            f"{where} has norm_output = {raw['norm_output']}, which means two things: SGLang feeds "
            f"the normed state back into the chain, SpecForge norms before the head. Say which with "
            f"drafter.norm_output=fed_back (SGLang) or drafter.norm_output=before_head (SpecForge)"
        )
    if said == "before_head" and not raw["norm_output"]:
        raise CheckpointError(
            f"{where}: SpecForge's norm_output = false leaves out the norm before the head, which "
            f"the eagle3 drafter does not implement"
        )
    return bool(raw["norm_output"]) and said == "fed_back"


def _from_speculators(raw: Mapping[str, Any], where: Path) -> Eagle3Config:
    if (kind := raw.get("speculators_model_type", "eagle3")) != "eagle3":
        raise CheckpointError(f"{where} is a speculators {kind!r} model, not 'eagle3'")
    layer = raw.get("transformer_layer_config") or {}
    refuse_unknown(where, speculators_problems(raw))
    keys = completed(layer)
    keys["draft_vocab_size"] = raw.get("draft_vocab_size", 32000)  # what speculators takes
    for key in ("target_hidden_size", "norm_before_residual", "norm_output"):
        if key in raw:
            keys[key] = raw[key]
    for key in ("fc_norm", "norm_before_fc"):
        keys[key] = bool(raw.get(key))
    ids = raw.get("eagle_aux_hidden_state_layer_ids")
    keys["feature_layers"] = ids and from_hidden_states(ids)
    return convert_config(keys, Eagle3Config, where)


def read(directory: Path, settings: DrafterSettings | None = None) -> Checkpoint[Eagle3Config]:
    """A whole checkpoint in our own terms.

    Raises:
        CheckpointError: as ``read_shape``, or the weights cannot be read.
    """
    config, form, raw = read_shape(directory, settings)
    tensors = read_tensors(directory)
    tensors = {name: t for name, t in tensors.items() if name not in VERIFIERS_OWN}
    if form == "speculators":
        tensors = rename(tensors, {**SPECULATORS_NAMES, **_upper_norms(config)})
    else:
        tensors = _one_upper_norm(rename(tensors, FLAT_NAMES), config, directory)
    if config.draft_vocab_size is None and config.misread:
        tensors = without_identity(tensors)
    tensors = complete_maps(tensors, config.draft_vocab_size, config.vocab_size)
    return Checkpoint(config, tensors, form, raw)


def _upper_norms(config: Eagle3Config, to_speculators: bool = False) -> dict[str, str]:
    """What a further layer's norm is called by speculators and vLLM, and by SGLang, as here."""
    layers = range(1, config.num_hidden_layers)
    names = {f"layers.{i}.input_layernorm.": f"layers.{i}.hidden_norm." for i in layers}
    return {ours: theirs for theirs, ours in names.items()} if to_speculators else names


def _one_upper_norm(
    tensors: dict[str, Tensor], config: Eagle3Config, directory: Path
) -> dict[str, Tensor]:
    """A flat file's tensors with one norm for each further layer, of which SGLang has two.

    Raises:
        CheckpointError: both are there and differ, so that SGLang and vLLM would norm otherwise.
    """
    kept = dict(tensors)
    for theirs, ours in _upper_norms(config).items():
        unused = kept.pop(f"{theirs}weight", None)
        used = kept.setdefault(f"{ours}weight", unused) if unused is not None else None
        if used is None or unused is None:
            continue
        if not torch.equal(used, unused) and bool((unused != 1).any()):
            raise CheckpointError(
                f"{directory} has two norms for one layer, {ours}weight, by which SGLang goes, and "
                f"{theirs}weight, by which vLLM goes; leave one of them"
            )
    return kept


def write(checkpoint: Checkpoint[Eagle3Config], directory: Path, form: str) -> None:
    """Write in a format.

    Raises:
        CheckpointError: the format, or who reads it, cannot express this head.
    """
    config = checkpoint.config
    if problems := unfit(config, form, own_embedding="embed_tokens.weight" in checkpoint.tensors):
        raise CheckpointError(
            f"this head cannot be written for {form}:\n" + "\n".join(f"  {p}" for p in problems)
        )
    if form == "speculators":
        tensors = rename(
            checkpoint.tensors, {"midlayer.": "layers.0.", **_upper_norms(config, True)}
        )
        if config.draft_vocab_size == config.vocab_size:  # speculators has no map then
            tensors = {name: t for name, t in tensors.items() if name not in {"d2t", "t2d"}}
        write_checkpoint(directory, _to_speculators(checkpoint), tensors)
    else:
        write_checkpoint(directory, _to_flat(checkpoint), checkpoint.tensors)


def unfit(config: Eagle3Config, form: str, own_embedding: bool = False) -> list[str]:
    """Why a format, or the program that reads it, cannot have this head; empty where it can."""
    if form not in FORMATS:
        raise CheckpointError(f"eagle3 has no format {form!r}; there are: {', '.join(FORMATS)}")
    if form == "speculators":
        problems = []
        if config.draft_vocab_size is None:
            problems.append("no head of its own (draft_vocab_size is null)")
        if config.bias:
            problems.append("bias: speculators' fusion has none")
        return problems
    who = "SGLang" if form == "sglang" else "SpecForge"
    problems: list[str] = []
    if config.norm_before_residual:
        problems.append(f"norm_before_residual: {who} adds the state before the norm")
    if config.qk_norm:
        problems.append(f"model_type qwen3: {who} has no q_norm and k_norm in this layer")
    if config.attention_bias:
        problems.append(f"attention_bias: {who} has no bias in this layer")
    if config.num_hidden_layers > 1 and form == "specforge":
        problems.append(f"num_hidden_layers {config.num_hidden_layers}: SpecForge's heads have 1")
    layers = config.feature_layers or []
    if layers != sorted(layers):
        problems.append(f"feature layers {layers}: {who} fuses them in the target's order")
    if form == "sglang" and own_embedding and config.target_hidden_size is None:
        problems.append("an embedding of its own: SGLang puts the target's in its place")
    if form == "specforge":
        if config.norm_output:
            problems.append("norm_output: SpecForge feeds back the state before the norm")
        if config.norm_before_fc:
            problems.append("norm_before_fc: SpecForge has no such norm")
        if config.bias:
            problems.append("bias: SpecForge's fusion has none")
        if config.num_features != 3:
            problems.append(f"{config.num_features} feature layers: SpecForge has 3")
    return problems


def first_fit(config: Eagle3Config) -> str:
    """The format that a draft which was never in any is written in: the first that can."""
    return first_form(FORMATS, lambda form: unfit(config, form))


def _layer_keys(config: Eagle3Config) -> dict[str, Any]:
    ours = {
        "feature_layers", "norm_before_residual", "norm_output", "fc_norm", "norm_before_fc",
        "draft_vocab_size", "target_hidden_size", "rope_scaling", "rope_parameters", "rope_theta",
        "ids_by_target", "misread", "bias",
    }  # fmt: skip
    keys = {key: getattr(config, key) for key in config.__struct_fields__ if key not in ours}
    keys["num_key_value_heads"], keys["head_dim"] = config.kv_heads, config.width_of_head
    rope = config.rope
    keys["rope_theta"] = rope["rope_theta"]
    keys["rope_scaling"] = None if rope.keys() == {"rope_type", "rope_theta"} else rope
    return {key: value for key, value in keys.items() if value is not None}


def _to_flat(checkpoint: Checkpoint[Eagle3Config]) -> dict[str, Any]:
    config = checkpoint.config
    kept = checkpoint.raw if checkpoint.format != "speculators" else {}
    keys: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "tie_word_embeddings": False,
        **kept,
        **_layer_keys(config),
        "model_type": "llama",
        "draft_vocab_size": config.draft_vocab_size,  # SGLang needs the key, also where it is null
    }
    if config.target_hidden_size is not None:
        keys["target_hidden_size"] = config.target_hidden_size
    if config.fc_norm:
        keys["fc_norm"] = True
    if config.bias:
        keys["bias"] = True
    for key in ("norm_output", NORM_OUTPUT, "auto_map"):  # said below, or of code left behind
        keys.pop(key, None)
    if config.norm_output:
        keys["norm_output"], keys[NORM_OUTPUT] = True, "fed_back"
    nested = dict(keys.get("eagle_config") or {})
    if config.feature_layers:
        nested["eagle_aux_hidden_state_layer_ids"] = config.feature_layers
    if config.norm_before_fc:
        nested["norm_before_fc"] = True
    if nested:
        keys["eagle_config"] = nested
    return keys


def _to_speculators(checkpoint: Checkpoint[Eagle3Config]) -> dict[str, Any]:
    config = checkpoint.config
    kept = checkpoint.raw if checkpoint.format == "speculators" else {}
    layer = _layer_keys(config)
    layer.pop("rope_scaling", None)
    layer.pop("rope_theta")  # transformers 5 keeps it with the rest
    layer["rope_parameters"] = config.rope
    ids = config.feature_layers
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_config": speculators_block("eagle3", 3),
        **kept,
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {**kept.get("transformer_layer_config", {}), **layer},
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": ids and to_hidden_states(ids),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }
