"""PARD against transformers: a language model with its masks placed by hand.

The other families need packages that are not among our dependencies: tests/parity.

Letters: R texts, N anchors, K drafted tokens, V vocabulary, T tokens of a forward, F width of
features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import drafters.pard.drafter as pard_drafter
from cosched.engines.embedded.target import Target
from cosched.records import SignalBatch
from drafters.attention import attend_packed
from drafters.pard import PardConfig, PardDrafter
from tests.helpers.checkpoints import with_tokens
from tests.parity.world import (
    ROPES,
    STEPS,
    assert_same_logits,
    layer_keys,
    make_batch,
    relative_error,
    write_draft,
)

# A vocabulary padded further than the target's, with the mask in the padding, as published drafts
# have it.
VOCABULARY, MASK = 70, 68
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3 tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "one layer": {"model_type": "qwen3", "num_hidden_layers": 1},
    "sliding": {
        "model_type": "qwen3",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
    },
    "llama3 rope": {"model_type": "llama", "rope_scaling": ROPES["llama3"]},
    "qwen2 biases": {"model_type": "qwen2", "tie_word_embeddings": True},
}
PARD2 = {"model_type": "llama", "pard2": True, "pard2_target_layers": [-1, -2]}


def make_pard(target: Target, folder: Path, **options: Any) -> PardDrafter:
    options = {"num_hidden_layers": 2, **options}
    keys = layer_keys(target, options.pop("model_type")) | {"vocab_size": VOCABULARY}
    config = PardConfig(**keys, pard_token=MASK, **options)
    return write_draft(PardDrafter, config, with_tokens(target, target.vocab_size), folder, "amd")


@torch.no_grad()
def logits_of(model: Any, batch: SignalBatch, warp: Tensor | None = None) -> Tensor:
    """``[R, N, K, V]``: for every anchor one forward of the text up to it and K - 1 masks.

    ``warp`` is PARD-2's projection: a token takes the features before it, a mask its anchor's.
    """
    rows = []
    for anchor in batch.anchors_RN[0].tolist():
        ids_RT = F.pad(batch.tokens_RC1[:, : anchor + 1], (0, STEPS - 1), value=MASK)
        embedded = model.get_input_embeddings()(ids_RT)
        if warp is not None:
            before_RTF = F.pad(batch.features_RCF[:, :anchor], (0, 0, 1, 0))
            last_R1F = before_RTF[:, -1:].expand(-1, STEPS - 1, -1)
            embedded = embedded + 0.02 * torch.cat((before_RTF, last_R1F), 1) @ warp.T
        rows.append(model(inputs_embeds=embedded).logits[:, anchor:])
    return torch.stack(rows, 1)


def load_peer(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_pard(target: Target, tmp_path: Path, shape: str) -> None:
    """The folder that we write is a language model of transformers that drafts our logits."""
    drafter = make_pard(target, tmp_path, **SHAPES[shape])
    model = load_peer(tmp_path)
    shared = target.vocab_size  # what the draft has beyond it cannot be drafted
    assert_same_logits(drafter, target, lambda batch: logits_of(model, batch)[..., :shared])


def test_pard2(target: Target, tmp_path: Path) -> None:
    """The same with the target's features in the embeddings, and they matter."""
    drafter = make_pard(target, tmp_path, **PARD2)
    model = load_peer(tmp_path)
    warp = torch.load(tmp_path / "warp_model.bin", weights_only=True)["target_proj.weight"]
    shared = target.vocab_size
    assert_same_logits(drafter, target, lambda b: logits_of(model, b, warp)[..., :shared])
    batch = make_batch(target, drafter)
    assert relative_error(drafter.replay(batch), logits_of(model, batch)[..., :shared]) > 1e-2


def test_the_comparison_can_tell(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks that see the masks behind them move the logits past any tolerance."""
    drafter = make_pard(target, tmp_path, **SHAPES["qwen3 tied"])
    batch = make_batch(target, drafter)
    theirs = logits_of(load_peer(tmp_path), batch)[..., : target.vocab_size]
    monkeypatch.setattr(pard_drafter, "attend_packed", lambda *a: attend_packed(*a[:-1], None))
    assert relative_error(drafter.replay(batch), theirs) > 1e-2


def test_the_top_layer_is_computed_of_anchors_and_masks_only(
    target: Target, tmp_path: Path
) -> None:
    """It was of all the context, whose other rows nobody looked at."""
    drafter = make_pard(target, tmp_path, **SHAPES["qwen3 tied"])
    batch = make_batch(target, drafter)
    rows: list[int] = []
    for layer in drafter.network().model.layers:
        layer.mlp.register_forward_hook(
            lambda _, inputs, __: rows.append(inputs[0][..., 0].numel())
        )
    drafter.replay_states(batch)
    context, anchors_and_masks = batch.tokens_RC1.numel(), batch.paths_RNK.numel()
    masks = anchors_and_masks - batch.anchors_RN.numel()
    assert rows == [context, masks, anchors_and_masks]
