"""The shape of an EAGLE-3 head, whichever format it was published in."""

from __future__ import annotations

from drafters.config import DecoderConfig, check_layers


class Eagle3Config(DecoderConfig, frozen=True, kw_only=True, omit_defaults=True):
    """A decoder layer, and the options that published heads use.

    ``draft_vocab_size`` None borrows the target's head. ``feature_layers`` None means layers
    1, n/2 - 1 and n - 4 of n. ``norm_output`` feeds the normed state back into the chain (the
    meaning of SGLang and of speculators; SpecForge's key of that name is another thing).
    """

    model_type: str = "llama"
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False

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
        if self.num_hidden_layers != 1:
            found.append(f"num_hidden_layers {self.num_hidden_layers} (implemented: 1)")
        if self.window_of_layer(0):
            found.append("a sliding_attention layer in an EAGLE-3 head")
        if self.fc_norm and self.norm_before_fc:
            found.append("fc_norm and norm_before_fc at once")
        return found

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """Target layers whose outputs are fused: 'after that layer', 0-based.

        Raises:
            CheckpointError: the target does not have them.
        """
        default = (1, num_layers // 2 - 1, num_layers - 4)
        layers = tuple(self.feature_layers) if self.feature_layers else default
        return check_layers(layers, num_layers)
