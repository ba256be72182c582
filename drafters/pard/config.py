"""The shape of a PARD draft: a language model, its mask token, and for PARD-2 target features."""

from __future__ import annotations

from drafters.config import DecoderConfig
from drafters.layer_ids import of_pard2

MODEL_TYPES = ("llama", "qwen2", "qwen3")


class PardConfig(DecoderConfig, frozen=True, kw_only=True, omit_defaults=True):
    """Keys of AMD's files beside those of the language model.

    ``pard2_target_layers`` index transformers' ``hidden_states``: 0 is the embedding, i is after
    layer i - 1, and -1 is the last state, after the final norm.
    """

    pard_token: int
    tie_word_embeddings: bool = False
    pard2: bool = False
    spd_type: str | None = None
    pard2_scale: float = 0.02
    pard2_proj_bias: bool = False
    pard2_target_dim: int | None = None
    pard2_target_layers: list[int] | None = None

    @property
    def uses_features(self) -> bool:
        return self.pard2 or self.spd_type == "pard2"

    @property
    def num_features(self) -> int:
        return len(self.pard2_target_layers or []) if self.uses_features else 0

    @property
    def target_width(self) -> int:
        """Zero where the draft sees nothing of the target, or its file does not say."""
        return (self.pard2_target_dim or 0) // max(1, self.num_features)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model_type not in MODEL_TYPES:
            found.append(f"model_type {self.model_type!r} (implemented: {', '.join(MODEL_TYPES)})")
        if not 0 <= self.pard_token < self.vocab_size:
            found.append(
                f"pard_token {self.pard_token}, which its vocabulary of {self.vocab_size} lacks"
            )
        if self.uses_features and not self.pard2_target_layers:
            found.append("PARD-2 without pard2_target_layers")
        return found

    def layers_of(self, num_layers: int, model_type: str = "") -> tuple[int, ...]:
        """Target layers whose outputs are added in: 'after that layer', n for 'after the norm'.

        Raises:
            CheckpointError: the target does not have them.
        """
        del model_type  # these ids mean the same for every target
        return of_pard2(self.pard2_target_layers or [], num_layers) if self.uses_features else ()
