"""EAGLE-3: logits of replay and of serving against SpecForge, speculators and SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.engines.embedded.target import Target
from drafters.eagle3 import Eagle3Drafter
from tests.parity import sglang_peer, specforge_peer, speculators_peer
from tests.parity.world import ROPES, STEPS, assert_same_logits, load_draft, make_eagle3

Options = dict[str, Any]

PLAIN: dict[str, Options] = {"plain": {}, "fc_norm": {"fc_norm": True}}
LINEAR, LLAMA3, YARN = ({f"{name} rope": {"rope_scaling": ROPES[name]}} for name in ROPES)
FED_BACK: dict[str, Options] = {"norm_output": {"norm_output": True}}
NORM_BEFORE_FC: dict[str, Options] = {"norm_before_fc": {"norm_before_fc": True}}
LAYERS: dict[str, Options] = {
    "two layers": {"num_hidden_layers": 2},
    "three layers": {"num_hidden_layers": 3, "norm_output": True},
}
# It reads yarn as well, but wants keys that transformers has defaults for.
SPECFORGE = PLAIN | LINEAR | LLAMA3
SPECULATORS: dict[str, Options] = {
    **(PLAIN | FED_BACK | NORM_BEFORE_FC | LLAMA3 | YARN | LAYERS),
    "qwen3": {"model_type": "qwen3"},
    "two qwen3 layers": {"model_type": "qwen3", "num_hidden_layers": 2},
    "norm_before_residual": {"norm_before_residual": True},
    "whole vocabulary": {"draft_vocab_size": 96},
    "all at once": {
        "model_type": "qwen3",
        "norm_before_residual": True,
        "norm_output": True,
        "fc_norm": True,
    },
}
SGLANG: dict[str, Options] = {
    **(PLAIN | FED_BACK | NORM_BEFORE_FC | LLAMA3 | YARN | LAYERS),
    "bias": {"bias": True},
    "the target's head": {"draft_vocab_size": None},
}
TRAINERS: dict[str, tuple[Any, dict[str, Options]]] = {
    "specforge": (specforge_peer, SPECFORGE),
    "speculators": (speculators_peer, SPECULATORS),
}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param(form, options, id=f"{form}-{name}")
        for form, (_, cases) in TRAINERS.items()
        for name, options in cases.items()
    ],
)
def test_trainers(
    target: Target, target_folder: Path, tmp_path: Path, form: str, options: Options
) -> None:
    """SpecForge and speculators read what we wrote and unroll to our logits; we read what they save."""
    peer, _ = TRAINERS[form]
    drafter = make_eagle3(target, tmp_path / "ours", form, **options)
    model = peer.load_eagle3(tmp_path / "ours", target_folder)
    assert_same_logits(drafter, target, lambda b: peer.eagle3_logits(model, b, STEPS))
    model.save_pretrained(tmp_path / "theirs")
    again = load_draft(Eagle3Drafter, tmp_path / "theirs", target)
    assert_same_logits(again, target, lambda b: peer.eagle3_logits(model, b, STEPS))


def test_an_embedding_of_its_own(target: Target, target_folder: Path, tmp_path: Path) -> None:
    """Where speculators trained the embedding with the head, we draft with that one."""
    make_eagle3(target, tmp_path / "ours", "speculators")
    model = speculators_peer.load_eagle3(tmp_path / "ours", target_folder)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(torch.rand_like(model.embed_tokens.weight))
    model.save_pretrained(tmp_path / "theirs")
    drafter = load_draft(Eagle3Drafter, tmp_path / "theirs", target)
    assert_same_logits(drafter, target, lambda b: speculators_peer.eagle3_logits(model, b, STEPS))


@pytest.mark.parametrize("options", SGLANG.values(), ids=SGLANG)
def test_sglang(target: Target, target_folder: Path, tmp_path: Path, options: Options) -> None:
    """SGLang's class reads what we wrote, and drafts row by row with our logits."""
    drafter = make_eagle3(target, tmp_path, "sglang", **options)
    sglang_peer.start(target_folder)
    model = sglang_peer.load_eagle3(tmp_path)
    assert_same_logits(
        drafter, target, lambda b: sglang_peer.eagle3_logits(model, b, STEPS, target)
    )
    ids = drafter.target_ids()
    assert (model.hot_token_id is None) if ids is None else torch.equal(model.hot_token_id, ids)
