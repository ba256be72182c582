"""The drafts of the tiny world: one recipe for every family, trained alike."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cosched.loop.checksum import checksum
from cosched.protocols import LossSettings
from cosched.tinyworld.corpus import DOMAINS
from cosched.tinyworld.distill import DistillPlan, acceptance_by_step, distill
from cosched.tinyworld.tokens import load_tokens
from cosched.training.micro_step import BatchLoss
from drafters.dflash import DFlashConfig, DFlashDrafter
from drafters.eagle3 import Eagle3Config, Eagle3Drafter
from drafters.pard import PardConfig, PardDrafter
from losses.divergence import ForwardKL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.engines.embedded.target import Target

NUM_DRAFT_TOKENS = 3
MASK = 1  # the id of ``tokens.MASK``, the second special token

AnyDrafter = Eagle3Drafter | DFlashDrafter | PardDrafter


def make_eagle3(target: Target) -> Eagle3Drafter:
    """One layer as wide as the target's, with a head of its own."""
    config = Eagle3Config(**_layer(target), draft_vocab_size=target.vocab_size)
    return Eagle3Drafter.initialise(config, target, NUM_DRAFT_TOKENS)


def make_dflash(target: Target) -> DFlashDrafter:
    """Three layers and the features of three, for blocks of the anchor and three masks."""
    config = DFlashConfig(
        **_layer(target),
        num_hidden_layers=3,
        num_target_layers=target.num_layers,
        block_size=NUM_DRAFT_TOKENS + 1,
        mask_token_id=MASK,
    )
    return DFlashDrafter.initialise(config, target, NUM_DRAFT_TOKENS)


def make_pard(target: Target) -> PardDrafter:
    """A language model of four layers, which starts from nothing."""
    config = PardConfig(
        **_layer(target),
        model_type="qwen3",
        num_hidden_layers=4,
        tie_word_embeddings=True,
        pard_token=MASK,
        spd_type="pard",
    )
    return PardDrafter.initialise(config, target, NUM_DRAFT_TOKENS)


DRAFTS: dict[str, Callable[[Target], AnyDrafter]] = {
    "eagle3": make_eagle3,
    "dflash": make_dflash,
    "pard": make_pard,
}


def _layer(target: Target) -> dict[str, Any]:
    return {**layer_of(target), "rope_theta": 10000.0}


def layer_of(target: Target) -> dict[str, Any]:
    """What a draft's configuration says of a layer as large as the target's."""
    config = target.model.config
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }


def teach(
    name: str,
    target: Target,
    directory: Path,
    seed: int,
    plan: DistillPlan,
    num_crops: int,
    edges: tuple[int, ...],
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    """Teach a draft on short crops of code only, so that length and domain can shift; save it.

    Returns what it reached, for the model card; a draft that is there already is not trained again.
    """
    known = directory / f"{name}.json"
    if known.exists():
        return json.loads(known.read_text())
    started = time.perf_counter()
    torch.manual_seed(seed)
    drafter = DRAFTS[name](target)
    if isinstance(drafter, DFlashDrafter):  # its blocks are no longer than what it drafts
        plan = replace(plan, path=NUM_DRAFT_TOKENS)
    settings = LossSettings(kind="forward_kl", position_decay=0.9)
    batch_loss = BatchLoss(drafter, ForwardKL(settings), target.head, "hidden", precision="auto")
    tokens = directory / "tokens"
    distill(target, drafter, batch_loss, load_tokens(tokens, "code", "train"), plan, seed, advance)
    drafter.network().to(torch.bfloat16)
    drafter.save(directory / name)
    drafter.network().to(torch.float32)
    facts = {
        "seconds": time.perf_counter() - started,
        "tokens": plan.tokens,
        "parameters": sum(p.numel() for p in drafter.network().parameters()),
        "checksum": checksum(dict(drafter.network().state_dict())),
        "acceptance": {
            domain: acceptance_by_step(
                target,
                drafter,
                batch_loss,
                load_tokens(tokens, domain, "heldout"),
                2048,
                edges,
                NUM_DRAFT_TOKENS,
                num_crops,
            )
            for domain in DOMAINS
        },
    }
    known.write_text(json.dumps(facts))
    return facts
