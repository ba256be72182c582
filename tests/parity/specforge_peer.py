"""SpecForge's drafts: its loader, and the logits of its training-time test and of its blocks.

Letters: R texts, C rows of a text, N anchors, K drafted tokens, S = K + 1 rows of a block, V
vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from specforge.algorithms.common.dflash_family_model import create_dflash_sdpa_mask
from specforge.modeling.auto import AutoDraftModel
from torch import Tensor
from transformers import AutoConfig

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.records import SignalBatch


def load_eagle3(folder: Path, target_folder: Path) -> Any:
    """The head of a folder, with the target's embedding."""
    model = _load(folder, missing=["embed_tokens.weight"])
    model.load_embedding(str(target_folder))
    return model


def load_dflash(folder: Path, backend: str = "sdpa") -> Any:
    """The draft of a folder, on one of the attention functions of transformers."""
    return _load(folder, missing=[], attn_implementation=backend)


def _load(folder: Path, missing: list[str], **options: Any) -> Any:
    """As its exporter loads. Its from_pretrained leaves the rotary tables uninitialised: NaN."""
    config = AutoConfig.from_pretrained(folder, **options)
    model = AutoDraftModel.from_config(config)
    result = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert result == (missing, [])
    return model.eval()


@torch.no_grad()
def eagle3_logits(model: Any, batch: SignalBatch, steps: int) -> Tensor:
    """``[R, N, K, V]`` of an unrolling over all rows at once, as in training."""
    num_texts, num_rows = batch.features_RCF.shape[:2]
    hidden = model.project_hidden_states(batch.features_RCF)
    seen = torch.ones(num_texts, num_rows, dtype=torch.bool)
    mask = model.prepare_decoder_attention_mask(seen, hidden, num_texts, num_rows, 0)
    at_RC = torch.arange(num_rows).expand(num_texts, -1)
    tokens_RC, cache, logits = batch.tokens_RC1[:, 1:], [[], []], []
    for _ in range(steps):
        embedded = model.embed_input_ids(tokens_RC)
        hidden = model.backbone(embedded, hidden, cache, mask, at_RC, None)
        logits.append(model.compute_logits(hidden))
        tokens_RC = F.pad(tokens_RC[:, 1:], (0, 1))
    return torch.stack(logits, 2)[:, batch.anchors_RN[0] - 1]


@torch.no_grad()
def dflash_logits(model: Any, batch: SignalBatch, target: Target) -> Tensor:
    """``[R, N, K, V]`` of all blocks at once, with the mask that it trains with."""
    num_rows, num_anchors = batch.features_RCF.shape[1], batch.anchors_RN.shape[1]
    size = model.block_size
    place_RNS = batch.anchors_RN[..., None] + torch.arange(size)
    tokens_RNS = torch.full_like(place_RNS, model.mask_token_id)
    tokens_RNS[..., 0] = batch.tokens_RC1.gather(1, batch.anchors_RN)
    at_RC = torch.arange(num_rows).expand(len(place_RNS), -1)
    layout = {
        "anchor_positions": batch.anchors_RN,
        "block_keep_mask": torch.ones_like(batch.anchors_RN, dtype=torch.bool),
        "S": num_rows,
        "block_size": size,
        "device": batch.anchors_RN.device,
    }
    masks = {"full_attention": create_dflash_sdpa_mask(**layout)}
    if model.sliding_window is not None:
        window = model.sliding_window
        masks["sliding_attention"] = create_dflash_sdpa_mask(**layout, sliding_window=window)
    hidden = model(
        position_ids=torch.cat((at_RC, place_RNS.flatten(1)), 1),
        noise_embedding=target.embedding(tokens_RNS.flatten(1)),
        target_hidden=batch.features_RCF,
        attention_mask=masks,
    )
    return target.head(hidden.unflatten(1, (num_anchors, size))[:, :, 1:])


@torch.no_grad()
def dflash_block_logits(model: Any, batch: SignalBatch, target: Target, anchor: int) -> Tensor:
    """``[R, K, V]`` of one block behind one anchor, without a mask, as when it serves."""
    block = torch.full((len(batch.tokens_RC1), model.block_size), model.mask_token_id)
    block[:, 0] = batch.tokens_RC1[:, anchor]
    hidden = model(
        position_ids=torch.arange(anchor + model.block_size).expand(len(block), -1),
        noise_embedding=target.embedding(block),
        target_hidden=batch.features_RCF[:, :anchor],
    )
    return target.head(hidden[:, 1:])
