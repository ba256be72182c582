"""What the keys of a draft's ``config.json`` may say: an allow-list, one table a family.

A key is *read* (something here goes by it), *harmless* (it shapes no number, whatever it says), or
allowed with *only* some values, those with which it asks for nothing. Anything else is refused by
name: a key that nobody knows may change the arithmetic, and such a draft is worse without a word.
A key that is null is as good as absent, and one that begins with ``_`` is transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosched.errors import CheckpointError
from drafters.config import DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# What transformers, the trainers and the exporters write down about themselves, about text and about
# training: nothing that a forward pass of these layers looks at.
HARMLESS = frozenset({
    "add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "bad_words_ids", "base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "has_no_defaults_at_init", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference",
    "label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
})  # fmt: skip
LAYER_KEYS = frozenset(DecoderConfig.__struct_fields__) | {"max_window_layers"}
"""Keys of decoder layers, which ``DecoderConfig`` goes by."""

# Options of decoders that our layers do not have, and what they say where they are off.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_neox_style": (True,),  # SGLang's DFlash
    "rope_is_neox_style": (True,),  # SGLang's Llama
    "rope_interleave": (False,),
    # transformers' default is absolute, which no decoder reads
    "position_embedding_type": ("rope", "absolute"),
    "attention_sink_bias": (False,),
    "gating": (False,),
    "logit_scale": (1,),
    "final_logit_softcapping": (0, False),
    "attn_logit_softcapping": (0, False),
    "output_multiplier": (1,),
    "use_mrope": (False,),
}


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Keys at one place of one family's file, beside those that all files may have there."""

    read: Iterable[str]
    harmless: Iterable[str] = ()
    only: Mapping[str, tuple[Any, ...]] | None = None

    def problems(self, raw: Mapping[str, Any], inside: str = "") -> list[str]:
        """One line for each key that is refused, with its value and what would be allowed.

        ``inside`` is the key that ``raw`` stands under.
        """
        read, harmless = frozenset(self.read), HARMLESS.union(self.harmless)
        only = ONLY | dict(self.only or {})
        found: list[str] = []
        for key, value in raw.items():
            if value is None or key.startswith("_") or key in read or key in harmless:
                continue
            said = f"{inside}{key} = {_short(value)}"
            if key not in only:
                found.append(f"{said}: no such key is implemented, or known to change nothing")
            elif not any(_same(value, allowed) for allowed in only[key]):
                allowed = ", ".join(map(repr, (*only[key], None)))
                found.append(f"{said} (implemented: {allowed})")
        return found


def refuse_unknown(where: Path, problems: list[str]) -> None:
    """Refuse a file with such keys.

    Raises:
        CheckpointError: there are some; the message lists them.
    """
    if problems:
        raise CheckpointError(
            f"{where} asks for what is not implemented, and loading it anyway might draft badly in "
            f"silence:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nA key that changes no number can be taken out of the file"
        )


def _same(value: Any, allowed: Any) -> bool:
    """Equal, where True is not the number 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
