"""The shape of an EAGLE-3 head, whichever format it was published in."""

from __future__ import annotations

from drafters.config import DecoderConfig
from drafters.layer_ids import check_layers, eagle3_default, of_eagle_config


class Eagle3Config(DecoderConfig, frozen=True, kw_only=True, omit_defaults=True):
    """One decoder layer, in some heads more, and the options that published heads use.

    ``draft_vocab_size`` None borrows the target's head. ``feature_layers`` None means layers
    1, n/2 - 1 and n - 4 of n; with ``ids_by_target`` the target's type says how they count
    (``drafters.layer_ids``). ``norm_output`` feeds the normed state back into the chain (the
    meaning of SGLang and of speculators; SpecForge's key of that name is another thing). ``bias`` is
    that of the fusion. ``misread`` is what SGLang would take otherwise in the file as it is, for
    whom it is repaired when it is written.
    """

    model_type: str = "llama"
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    ids_by_target: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    bias: bool = False
    misread: tuple[str, ...] = ()

    @property
    def num_features(self) -> int:
        return len(self.feature_layers) if self.feature_layers else 3

    @property
    def target_width(self) -> int:
        return self.target_hidden_size or self.hidden_size

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model_type not in {"llama", "qwen3"}:
            found.append(f"model_type {self.model_type!r} (implemented: llama, qwen3)")
        if self.num_hidden_layers < 1:
            found.append(f"num_hidden_layers {self.num_hidden_layers} (implemented: 1 and more)")
        if any(self.windows):
            found.append("a sliding_attention layer in an EAGLE-3 head")
        if self.fc_norm and self.norm_before_fc:
            found.append("fc_norm and norm_before_fc at once")
        return found

    def layers_of(self, num_layers: int, model_type: str = "") -> tuple[int, ...]:
        """Target layers whose outputs are fused: 'after that layer', 0-based.

        Raises:
            CheckpointError: the target does not have them.
        """
        ids = self.feature_layers or eagle3_default(num_layers, model_type)
        if self.feature_layers and self.ids_by_target:
            ids = of_eagle_config(self.feature_layers, num_layers, model_type)
        return check_layers(tuple(ids), num_layers)
