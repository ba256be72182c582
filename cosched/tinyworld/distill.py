"""Drafts of the tiny world: trained offline on short crops of code, as public drafts are.

The student is trained through the same ``replay`` that adapts it later, so what is published with
the tiny world also tests that code.

Letters: R crops, T tokens of a crop, C = T - 1 rows of its context, N anchors, K drafted tokens,
F fused feature width, H hidden width.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.records import SignalBatch
from cosched.tinyworld.optimize import make_optimizers, rate_share, take_step
from cosched.training.precision import computing_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.embedded.target import Target
    from cosched.protocols import Drafter
    from cosched.tinyworld.tokens import TokenStore
    from cosched.training.micro_step import BatchLoss


@dataclass(frozen=True, slots=True)
class DistillPlan:
    """How long and on what a draft is trained."""

    tokens: int = 3_000_000
    length: int = 256
    batch: int = 8
    anchors: int = 96
    path: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    decay_share: float = 0.6


def crops_to_batch(
    target: Target,
    drafter: Drafter,
    ids_RT: Tensor,
    anchors_RN: Tensor,
    path: int,
) -> SignalBatch:
    """Teacher rows and features of whole crops, with the text itself as the path."""
    num_crops, length = ids_RT.shape
    device = ids_RT.device
    positions_RT = torch.arange(length, device=device).expand(num_crops, -1)
    rows = target.forward(
        ids_RT,
        positions_RT,
        target.new_cache(num_crops, length),
        drafter.signal.feature_layers,
        num_logits=1,
    )
    features = None if rows.features_BTF is None else rows.features_BTF[:, :-1]
    return batch_of_texts(ids_RT, features, rows.hidden_BTH, anchors_RN, path)


def batch_of_texts(
    ids_RT: Tensor,
    features_RCF: Tensor | None,
    hidden_RCH: Tensor,
    anchors_RN: Tensor,
    path: int,
) -> SignalBatch:
    """Whole texts as contexts, with what the target computed of them; all rows count.

    Features are of all tokens but the last, hidden states may be of the last as well.
    """
    (num_texts, length), device = ids_RT.shape, ids_RT.device
    ahead_K = torch.arange(path, device=device)
    teacher_at = (anchors_RN[..., None] + ahead_K).flatten(1)
    paths_RNK = ids_RT.gather(1, teacher_at + 1).unflatten(1, (-1, path))
    index = teacher_at[..., None].expand(-1, -1, hidden_RCH.shape[-1])
    return SignalBatch(
        starts_R=torch.zeros(num_texts, dtype=torch.int64, device=device),
        lengths_R=torch.full((num_texts,), length - 1, device=device),
        tokens_RC1=ids_RT,
        features_RCF=features_RCF,
        anchors_RN=anchors_RN,
        paths_RNK=paths_RNK,
        teacher_RNKX=hidden_RCH.gather(1, index).unflatten(1, (-1, path)),
        weights_RNK=torch.ones(paths_RNK.shape, device=device),
    )


def random_batch(
    target: Target,
    drafter: Drafter,
    store: TokenStore,
    plan: DistillPlan,
    generator: torch.Generator,
) -> SignalBatch:
    """Crops of a store with the first token as prompt and anchors anywhere behind it."""
    ids_RT = store.crops(plan.batch, plan.length, generator)
    anchors_RN = torch.stack(
        [
            1 + torch.randperm(plan.length - plan.path - 1, generator=generator)[: plan.anchors]
            for _ in range(plan.batch)
        ]
    )
    return crops_to_batch(target, drafter, ids_RT, anchors_RN, plan.path)


def distill(
    target: Target,
    drafter: Drafter,
    batch_loss: BatchLoss,
    store: TokenStore,
    plan: DistillPlan,
    seed: int,
    advance: Callable[[int, str], None],
) -> None:
    """Teach the drafter in place; ``advance(tokens, message)`` is called after every step."""
    generator = torch.Generator().manual_seed(seed)
    network = batch_loss.network.train()
    optimizers = make_optimizers(network, weight_decay=0.01)
    step_tokens = plan.batch * plan.length
    num_steps = plan.tokens // step_tokens
    for step in range(num_steps):
        started = time.perf_counter()
        rate = plan.learning_rate * rate_share(
            step, step / num_steps, plan.warmup_steps, plan.decay_share
        )
        with computing_in("auto", torch.device("cpu")):
            loss = batch_loss(random_batch(target, drafter, store, plan, generator))
        take_step(loss, network.parameters(), optimizers, rate)
        speed = step_tokens / (time.perf_counter() - started)
        advance(step_tokens, f"loss {loss.item():.3f}, {speed:.0f} tokens/s")
    network.eval()


@torch.no_grad()
def acceptance_by_step(
    target: Target,
    drafter: Drafter,
    batch_loss: BatchLoss,
    store: TokenStore,
    length: int,
    edges: tuple[int, ...],
    path: int,
    num_crops: int = 8,
) -> list[list[float]]:
    """Expected acceptance ``sum_v min(p, q)`` by position bucket and drafted position."""
    generator = torch.Generator().manual_seed(2)
    ids_RT = store.crops(num_crops, length, generator)
    anchors_RN = torch.arange(1, length - path, 5).expand(num_crops, -1)
    overlaps = []
    for ids_T, anchors_N in zip(ids_RT, anchors_RN, strict=True):
        batch = crops_to_batch(target, drafter, ids_T[None], anchors_N[None], path)
        student = drafter.replay(batch).float().softmax(-1)
        overlaps.append(
            torch.minimum(student, batch_loss.teacher_logits(batch).softmax(-1)).sum(-1)
        )
    overlap_NK = torch.cat(overlaps).mean(0)
    at_N = anchors_RN[0]
    return [
        overlap_NK[(at_N >= a) & (at_N < b)].mean(0).tolist() for a, b in itertools.pairwise(edges)
    ]
