"""PARD checkpoints: a transformers folder with ``pard_token``, and PARD-2's ``warp_model.bin``.

AMD publishes one format. SGLang loads the folder as the language model that it is, so ``sglang`` is
the same files; it has no worker that drafts with masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.errors import CheckpointError
from drafters.checkpoint import Checkpoint, read_config, read_tensors, write_checkpoint
from drafters.config import DecoderConfig, convert_config
from drafters.keys import LAYER_KEYS, KeyTable, refuse_unknown
from drafters.pard.config import PardConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cosched.protocols import DrafterSettings

FORMATS = ("amd", "sglang")
WARP = "warp_model.bin"
PROJECTION = "target_proj."
TIED = "lm_head.weight"
# Names that earlier releases of AMD's code gave the same keys.
OLD_KEYS = {
    "pard_scale": "pard2_scale", "feat_scale": "pard2_scale", "proj_bias": "pard2_proj_bias",
    "pard_target_dim": "pard2_target_dim", "target_layers": "pard2_target_layers",
}  # fmt: skip
KEYS = KeyTable(read=LAYER_KEYS.union(PardConfig.__struct_fields__, OLD_KEYS))


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a PARD draft."""
    return "pard_token" in raw


def first_fit(config: PardConfig) -> str:
    """The format that a draft which was never in any is written in."""
    del config
    return FORMATS[0]


def not_for_sglang(config: PardConfig, names: frozenset[str]) -> list[str]:
    """Why stock SGLang would not run this draft as it is."""
    del config, names
    return [
        "SGLang has no worker that drafts through mask tokens; it would run the folder as a language "
        "model that drafts one token after the other (STANDALONE)"
    ]


def read_shape(
    directory: Path, settings: DrafterSettings | None = None
) -> tuple[PardConfig, str, dict[str, Any]]:
    """Configuration, format, and the file itself, without weights.

    Raises:
        CheckpointError: a key is missing or mistyped, or asks for what is not implemented.
    """
    del settings  # these files say everything themselves
    raw = read_config(directory)
    where = directory / "config.json"
    if "pard_token" not in raw:
        raise CheckpointError(
            f"{where} has no pard_token: a language model that was not taught to draft through "
            f"masks is no PARD draft"
        )
    refuse_unknown(where, KEYS.problems(raw))
    keys = {OLD_KEYS.get(key, key): value for key, value in raw.items()}
    if keys.get("pard2") or keys.get("spd_type") == "pard2":
        keys.setdefault("pard2_target_dim", 4096)  # what AMD's code takes
    return convert_config(keys, PardConfig, where), "amd", raw


def read(directory: Path, settings: DrafterSettings | None = None) -> Checkpoint[PardConfig]:
    """A whole checkpoint. ``warp_model.bin`` is read as tensors: code in it is not run.

    Raises:
        CheckpointError: as ``read_shape``, or the weights cannot be read.
    """
    config, form, raw = read_shape(directory, settings)
    tensors = read_tensors(directory, extra=[WARP] if config.uses_features else [])
    table = tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and TIED in tensors and table is not None:
        if tensors[TIED].dtype != table.dtype or not torch.equal(tensors[TIED], table):
            raise CheckpointError(
                f"{directory} says tie_word_embeddings, but its lm_head.weight is not its embedding"
            )
        tensors.pop(TIED)
    return Checkpoint(config, tensors, form, raw)


def write(checkpoint: Checkpoint[PardConfig], directory: Path, form: str) -> None:
    """Write in a format.

    Raises:
        CheckpointError: there is no such format, or the folder cannot be written.
    """
    if form not in FORMATS:
        raise CheckpointError(f"pard has no format {form!r}; there are: {', '.join(FORMATS)}")
    config, tensors = checkpoint.config, checkpoint.tensors
    # Written out where it is our default, too: transformers has others (32 layers).
    shape = {name: getattr(config, name) for name in DecoderConfig.__struct_fields__}
    if "sliding_attention" in (config.layer_types or []):
        shape["use_sliding_window"] = True  # without it transformers forgets the window
    keys: dict[str, Any] = {
        "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
        **checkpoint.raw,
        **{name: value for name, value in shape.items() if value is not None},
        **msgspec.to_builtins(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width_of_head,
        "tie_word_embeddings": config.tie_word_embeddings,
        "spd_type": "pard2" if config.uses_features else "pard",
    }
    body = {name: t for name, t in tensors.items() if not name.startswith(PROJECTION)}
    warp = {n: t.detach().cpu().clone() for n, t in tensors.items() if n not in body}
    if config.uses_features:
        keys["pard2_target_dim"] = warp[f"{PROJECTION}weight"].shape[1]
    keys.pop("auto_map", None)  # of code that does not come along
    write_checkpoint(directory, keys, body, {WARP: warp} if warp else {})
