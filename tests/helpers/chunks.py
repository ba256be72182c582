"""Rows of logits in chunks: drafts, losses and scorers to hold them, and the most that is held.

Letters: R requests, N anchors, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.guard.scorer import AcceptanceScorer
from cosched.memory.live import LivePeak
from cosched.records import Acceptance, SignalBatch
from cosched.registry import DRAFTERS, LOSSES
from cosched.testing.harness import make_target
from cosched.testing.specimen import as_batch, make_texts
from cosched.training.micro_step import BatchLoss

VOCAB, CHUNK, PATH = 20_000, 8, 4
QWEN3_VOCAB = 151_936
ROW_LOSSES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {},
    "total_variation": {},
    "negative_log_acceptance": {},
    "lk_hybrid": {},
    "hard_cross_entropy": {},
    "negative_log_target_only": {"sharpness": 2.0},
    "top_k_cross_entropy": {"k": 8},
}
SUM = {"terms": [{"kind": "forward_kl"}, {"kind": "proximal_kl", "weight": 0.5}]}
LOSSES_TO_TEST = {**ROW_LOSSES, "sum": SUM}
DRAFTERS_TO_TEST = (
    ("eagle3", "plain"),
    ("eagle3", "reduced vocabulary"),
    ("dflash", "plain"),
    ("pard", "qwen3"),
)

# Rows as wide as the vocabulary that a chunk makes at once, in chunks: what is saved for the
# gradient, and what an operation has beside it.
MOST = 10


@cache
def large_target() -> Target:
    return make_target(VOCAB, std=0.1)


@cache
def small_target() -> Target:
    return make_target(dtype=torch.float64)


def make_loss(kind: str, **own: Any) -> Any:
    cls = LOSSES.get(kind)
    raw = {"kind": kind, **LOSSES_TO_TEST[kind], **own}
    return cls(msgspec.convert(raw, cls.Settings))


def make_drafter(target: Target, kind: str, example: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    drafter = DRAFTERS.get(kind).examples(target, PATH)[example]
    copy = drafter.clone(dtype)
    copy.network().requires_grad_(True)
    return copy


def make_batch(target: Target, drafter: Any, num_anchors: int, num_texts: int = 2) -> SignalBatch:
    """Rows of random texts with random hidden states for teachers; all rows count."""
    texts = make_texts(target, drafter, count=num_texts, length=num_anchors + PATH + 8)
    anchors = torch.arange(2, num_anchors + 2).expand(num_texts, -1)
    batch = as_batch(texts, anchors, PATH, None)
    generator = torch.Generator().manual_seed(5)
    shape = (*batch.paths_RNK.shape, target.hidden_size)
    teacher = torch.randn(shape, generator=generator, dtype=target.dtype)
    return replace(batch, teacher_RNKX=teacher, temperatures=(0.7,) * num_texts)


def is_logits(operation: Any, result: Tensor) -> bool:
    """What a head gives: a matrix product with the vocabulary last."""
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    return operation.overloadpacket in products and is_as_wide(operation, result)


def is_as_wide(operation: Any, result: Tensor) -> bool:
    """Whatever has the vocabulary last: logits, their gradient, softmaxes, products of them."""
    return result.ndim > 0 and result.shape[-1] in {VOCAB, QWEN3_VOCAB}


def peak_rows(module: BatchLoss, batch: SignalBatch, counts: Any) -> float:
    """Most rows of float32 logits, or of what is as wide, that a step holds at once."""
    module.begin_update(batch)
    with LivePeak(counts) as live:
        module(batch).backward()
    return live.peak / (4 * VOCAB)


def make_scorer(
    target: Target,
    drafter: Any,
    chunk_rows: int | None,
    served_as: torch.dtype = torch.float32,
    acceptance: Acceptance = "sampled",
) -> AcceptanceScorer:
    copy = drafter.clone(torch.float32)
    return AcceptanceScorer(
        copy, target.head, "hidden", served_as, acceptance, chunk_rows=chunk_rows
    )


def two_of(drafter: Any) -> list[dict[str, Tensor]]:
    """Weights to be compared: the draft's own, and others."""
    own = {name: p.detach() for name, p in drafter.network().named_parameters()}
    generator = torch.Generator().manual_seed(2)
    return [
        own,
        {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in own.items()},
    ]
