"""Keys of EAGLE-3 heads' ``config.json``: the family's tables for ``drafters.keys``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drafters.keys import LAYER_KEYS, KeyTable

if TYPE_CHECKING:
    from collections.abc import Mapping

NORM_OUTPUT = "cosched_norm_output"  # our own word on norm_output, in flat files that we write

FLAT_KEYS = KeyTable(
    read=LAYER_KEYS
    | {
        "draft_vocab_size", "target_hidden_size", "eagle_config", "norm_before_fc", "fc_norm",
        "use_aux_norm", "norm_output", NORM_OUTPUT, "num_aux_hidden_states",
        "norm_before_residual", "bias",
    },
    only={"tie_word_embeddings": (False,)},  # SGLang would draft with its embedding as the head
)  # fmt: skip
EAGLE_CONFIG_KEYS = KeyTable(
    read={"eagle_aux_hidden_state_layer_ids", "norm_before_fc"},
    harmless={"next_layer_regular", "parallel_draft_heads_num_layers"},
    only={  # Model-Optimizer's
        "use_aux_hidden_state": (True,),
        "use_input_layernorm_in_first_layer": (True,),
        "use_last_layernorm": (True,),
        "use_mtp_layernorm": (False,),
        "parallel_draft_step": (1,),
    },
)
SPECULATORS_KEYS = KeyTable(
    read={
        "speculators_model_type", "speculators_config", "transformer_layer_config",
        "draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_output", "fc_norm",
        "norm_before_fc", "eagle_aux_hidden_state_layer_ids",
    },
    harmless={"speculators_version", "embed_requires_grad", "tie_word_embeddings", "model_type"},
)  # fmt: skip
LAYER_CONFIG_KEYS = KeyTable(read=LAYER_KEYS, harmless={"tie_word_embeddings"})


def flat_problems(raw: Mapping[str, Any]) -> list[str]:
    """Keys of a file of SafeAILab's, SpecForge's or SGLang's that are refused, one a line."""
    nested = raw.get("eagle_config") or {}
    return FLAT_KEYS.problems(raw) + EAGLE_CONFIG_KEYS.problems(nested, "eagle_config.")


def speculators_problems(raw: Mapping[str, Any]) -> list[str]:
    """The same of a file of speculators'."""
    layer = raw.get("transformer_layer_config") or {}
    found = SPECULATORS_KEYS.problems(raw)
    return found + LAYER_CONFIG_KEYS.problems(layer, "transformer_layer_config.")
