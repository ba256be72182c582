"""DFlash: logits of replay and of serving against SpecForge, speculators and SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.engines.embedded.target import Target
from drafters.dflash import DFlashDrafter
from tests.parity import sglang_peer, specforge_peer, speculators_peer
from tests.parity.world import (
    MASK,
    ROPES,
    SLIDING,
    TOLERANCE,
    assert_same_logits,
    load_draft,
    make_batch,
    make_dflash,
    relative_error,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": SLIDING,
    "yarn rope": {"rope_scaling": ROPES["yarn"]},
}
SPECULATORS: dict[str, dict[str, Any]] = {
    "whole vocabulary": {},
    "reduced vocabulary": {"draft_vocab_size": 40},
    "llama3 rope": {"rope_scaling": ROPES["llama3"]},
}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_specforge(target: Target, tmp_path: Path, backend: str, options: dict[str, Any]) -> None:
    """SpecForge reads what we wrote; its blocks, in training and one by one, have our logits."""
    drafter = make_dflash(target, tmp_path, "specforge", **options)
    model = specforge_peer.load_dflash(tmp_path, backend)
    assert_same_logits(drafter, target, lambda b: specforge_peer.dflash_logits(model, b, target))
    if not options:  # without a mask all rows see all
        batch = make_batch(target, drafter)
        theirs = specforge_peer.dflash_block_logits(model, batch, target, anchor=6)
        assert relative_error(drafter.replay(batch)[:, 5], theirs) < TOLERANCE


@pytest.mark.parametrize("options", SPECULATORS.values(), ids=SPECULATORS)
def test_speculators(
    target: Target, target_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """speculators reads what we wrote and drafts our logits; we read what it saves."""
    drafter = make_dflash(target, tmp_path / "ours", "speculators", **options)
    model = speculators_peer.load_dflash(tmp_path / "ours", target_folder)
    assert_same_logits(drafter, target, lambda b: speculators_peer.dflash_logits(model, b))
    model.save_pretrained(tmp_path / "theirs")
    again = load_draft(DFlashDrafter, tmp_path / "theirs", target)
    assert_same_logits(again, target, lambda b: speculators_peer.dflash_logits(model, b))


@pytest.mark.parametrize("causal", [True, False])
def test_speculators_sliding(
    target: Target, target_folder: Path, tmp_path: Path, causal: bool
) -> None:
    """A draft with sliding layers in the format of speculators drafts its logits."""
    sliding = {**SLIDING, "sliding_causal": causal, "window_from": "anchor"}
    drafter = make_dflash(target, tmp_path, "speculators", **sliding)
    model = speculators_peer.load_dflash(tmp_path, target_folder)
    assert_same_logits(drafter, target, lambda b: speculators_peer.dflash_logits(model, b))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sglang(
    target: Target, target_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """SGLang's class reads what we wrote, and drafts block by block with our logits."""
    drafter = make_dflash(target, tmp_path, "sglang", **options)
    sglang_peer.start(target_folder)
    model = sglang_peer.load_dflash(tmp_path)
    assert_same_logits(drafter, target, lambda b: sglang_peer.dflash_logits(model, b, target, MASK))


def test_the_window_cuts(target: Target, tmp_path: Path) -> None:
    """The sliding layer matters in these texts, so that the comparisons above compare it."""
    full = make_dflash(target, tmp_path / "full", "specforge")
    cut = make_dflash(target, tmp_path / "cut", "specforge", **SLIDING)
    assert torch.equal(full.network().fc.weight, cut.network().fc.weight)
    batch = make_batch(target, full)
    assert relative_error(full.replay(batch), cut.replay(batch)) > 1e-2
