"""The drafts of speculators: its loader, and the logits behind the tokens that it returns.

Its models take one packed row of documents, so texts go one by one.

Letters: R texts, N anchors, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.records import SignalBatch


def load_eagle3(folder: Path, target_folder: Path) -> Any:
    return _load(Eagle3DraftModel, Eagle3SpeculatorConfig, folder, target_folder)


def load_dflash(folder: Path, target_folder: Path) -> Any:
    return _load(DFlashDraftModel, DFlashSpeculatorConfig, folder, target_folder)


def _load(model_class: Any, config_class: Any, folder: Path, target_folder: Path) -> Any:
    """A model of a folder, told whose draft it is.

    It takes the target's embedding and head where its own are NaN, which is how it marks what a
    folder lacks; transformers 5 leaves such tensors uninitialised instead, so it is asked again.
    """
    config = config_class.from_pretrained(folder)
    config.speculators_config.verifier.name_or_path = str(target_folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = model_class.from_pretrained(folder, config=config).eval()
    with safe_open(folder / "model.safetensors", "pt") as file:
        own = set(file.keys())
    model._load_verifier_weights(
        overwrite_embed_tokens="embed_tokens.weight" not in own,
        overwrite_lm_head="lm_head.weight" not in own,
    )
    return model


@torch.no_grad()
def eagle3_logits(model: Any, batch: SignalBatch, steps: int) -> Tensor:
    """``[R, N, K, V]`` of an unrolling over all rows at once, as in training."""
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, output: logits.append(output[0]))
    for tokens_C1, features_CF in zip(batch.tokens_RC1, batch.features_RCF, strict=True):
        tokens_1C = tokens_C1[None, 1:]
        model(
            hidden_states=features_CF[None],
            input_ids=tokens_1C,
            document_ids=torch.zeros_like(tokens_1C),
            ttt_steps=steps,
        )
    hook.remove()
    rows_RKCV = torch.stack(logits).unflatten(0, (-1, steps))
    return rows_RKCV[:, :, batch.anchors_RN[0] - 1].transpose(1, 2)


@torch.no_grad()
def dflash_logits(model: Any, batch: SignalBatch) -> Tensor:
    """``[R, N, K, V]`` of all blocks at once. It draws anchors from the loss mask: all of it."""
    anchors_N = batch.anchors_RN[0]
    rows = []
    for tokens_C1, features_CF in zip(batch.tokens_RC1, batch.features_RCF, strict=True):
        # It takes no anchor from the last rows, of which a block length is appended here.
        tokens_1C = torch.nn.functional.pad(tokens_C1[None], (0, model.block_size))
        features_1CF = torch.nn.functional.pad(
            features_CF[None], (0, 0, 0, tokens_1C.shape[1] - len(features_CF))
        )
        may_be_anchor = torch.zeros_like(tokens_1C)
        may_be_anchor[:, anchors_N] = 1
        _, logits, *_ = model._backbone_forward(
            features_1CF,
            tokens_1C,
            may_be_anchor,
            torch.zeros(*tokens_1C.shape, model.hidden_size),
            torch.zeros_like(tokens_1C),
            max_anchors=len(anchors_N),
        )
        rows.append(logits[0].unflatten(0, (len(anchors_N), model.block_size))[:, 1:])
    return torch.stack(rows)
