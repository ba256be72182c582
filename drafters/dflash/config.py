"""The shape of a DFlash block drafter, whichever format it was published in."""

from __future__ import annotations

from typing import Literal

from cosched.errors import CheckpointError
from drafters.config import DecoderConfig
from drafters.layer_ids import check_layers, dflash_default


class DFlashConfig(DecoderConfig, frozen=True, kw_only=True, omit_defaults=True):
    """Decoder layers, and what a block is made of.

    A block is the anchor and ``block_size - 1`` masks. ``feature_layers`` None spreads as many as
    there are draft layers from layer 1 to n - 3 of n. ``mask_token_id`` None looks
    ``mask_token`` up in the target's tokenizer. ``draft_vocab_size`` None borrows the target's
    head.

    In ``sliding_attention`` layers ``sliding_causal`` rows of a block see only earlier ones, and the
    window is counted back from each row, as SGLang and SpecForge do, or for all rows of a block from
    its anchor, as speculators does (``window_from``).
    """

    model_type: str = "qwen3"
    block_size: int = 16
    mask_token_id: int | None = None
    mask_token: str = "<|MASK|>"  # SGLang's default
    feature_layers: list[int] | None = None
    num_target_layers: int | None = None
    draft_vocab_size: int | None = None
    sliding_causal: bool = True
    window_from: Literal["row", "anchor"] = "row"

    @property
    def num_features(self) -> int:
        return len(self.feature_layers) if self.feature_layers else self.num_hidden_layers

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model_type != "qwen3":
            found.append(f"model_type {self.model_type!r} (implemented: qwen3)")
        if self.block_size < 2:
            found.append(f"block_size {self.block_size}: a block is an anchor and its masks")
        return found

    def layers_of(self, num_layers: int, model_type: str = "") -> tuple[int, ...]:
        """Target layers whose outputs are fused: 'after that layer', 0-based.

        Raises:
            CheckpointError: the target does not have them, or it is another target.
        """
        del model_type  # these ids mean the same for every target
        if self.num_target_layers not in {None, num_layers}:
            raise CheckpointError(
                f"the draft was trained for a target of {self.num_target_layers} layers, "
                f"this one has {num_layers}"
            )
        layers = tuple(self.feature_layers or dflash_default(num_layers, self.num_hidden_layers))
        return check_layers(layers, num_layers)
