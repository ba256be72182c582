"""Losses and gradients of training against SpecForge's training models.

Our trainer weighs rows in its own way; here its logits go through SpecForge's formulas, written
out, so that what is compared is the gradient through replay.

Letters: R texts, C rows of a text, N anchors, K drafted tokens, V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.records import SignalBatch
from tests.parity import specforge_peer
from tests.parity.world import (
    LENGTH,
    MASK,
    SLIDING,
    STEPS,
    TOLERANCE,
    make_batch,
    make_dflash,
    make_eagle3,
    relative_error,
)

EAGLE3_DECAY = 0.8
DFLASH_GAMMA = 7.0


def gradients(loss: Tensor, network: Any) -> dict[str, Tensor]:
    """By name, of all parameters that are trained."""
    named = {n: p for n, p in network.named_parameters() if not n.startswith("embed_tokens.")}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(errors.values()) < TOLERANCE, errors


def trainable(drafter: Any) -> Any:
    copy = drafter.clone(torch.float32)
    copy.network().requires_grad_(True)
    return copy


def test_eagle3(target: Target, target_folder: Path, tmp_path: Path) -> None:
    """Three steps of training-time test have SpecForge's losses and gradients.

    ``loss_s = -1/(R C) sum_rows m[t + s] sum_u p[t + s, u] log q_s[t, u]``: p is the target's
    softmax over the draft's vocabulary, m leaves out rows whose likeliest token is not in it.
    """
    drafter = trainable(make_eagle3(target, tmp_path, "specforge"))
    model = specforge_peer.load_eagle3(tmp_path, target_folder)
    batch = make_batch(target, drafter)
    teacher_RCV = target.model(input_ids=batch.tokens_RC1).logits[:, 1:]
    # The last row that all anchors of the batch reach with their first step.
    taught_RC1 = torch.ones(*teacher_RCV.shape[:2], 1)
    taught_RC1[:, batch.anchors_RN.shape[1] :] = 0
    theirs_K, *_ = OnlineEagle3Model(model, length=STEPS)(
        input_ids=batch.tokens_RC1[:, 1:],
        attention_mask=None,
        target=teacher_RCV,
        loss_mask=taught_RC1,
        hidden_states=batch.features_RCF,
    )
    ours_K = eagle3_losses(drafter, batch, teacher_RCV, taught_RC1[..., 0])
    weights_K = EAGLE3_DECAY ** torch.arange(STEPS)
    for ours, theirs in zip(ours_K, theirs_K, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE
    assert_equal_gradients(
        gradients(weights_K @ torch.stack(ours_K), drafter.network()),
        gradients(weights_K @ torch.stack(theirs_K), model),
    )


def eagle3_losses(
    drafter: Any, batch: SignalBatch, teacher_RCV: Tensor, taught_RC: Tensor
) -> list[Tensor]:
    network = drafter.network()
    sayable_RC = network.t2d[teacher_RCV.argmax(-1)]
    teacher_RCU = teacher_RCV[..., network.t2d].softmax(-1)
    logs_RNKU = drafter.replay(batch).log_softmax(-1)
    losses = []
    for step in range(STEPS):
        row_N = batch.anchors_RN[0] - 1 + step
        terms_RN = (teacher_RCU[:, row_N] * logs_RNKU[:, :, step]).sum(-1)
        mask_RN = sayable_RC[:, row_N] * taught_RC[:, row_N]
        losses.append(-(mask_RN * terms_RN).sum() / taught_RC.numel())
    return losses


def test_dflash(target: Target, tmp_path: Path) -> None:
    """Packed blocks have SpecForge's loss and gradients.

    ``sum w_k m CE / sum w_k m``, ``w_k = exp(-(k - 1) / gamma)`` for row k of a block, over blocks
    at every anchor whose next token is trained.
    """
    drafter = trainable(make_dflash(target, tmp_path, "specforge", **SLIDING))
    model = specforge_peer.load_dflash(tmp_path)
    batch = make_batch(target, drafter)
    num_anchors = batch.anchors_RN.shape[1]
    taught_RC = torch.zeros(2, LENGTH)
    taught_RC[:, 1 : num_anchors + 2] = 1
    peer = OnlineDFlashModel(
        model,
        target.head,
        target.embedding,
        mask_token_id=MASK,
        block_size=STEPS + 1,
        attention_backend="sdpa",
        num_anchors=num_anchors,
        loss_decay_gamma=DFLASH_GAMMA,
    )
    features_RCF = F.pad(batch.features_RCF, (0, 0, 0, 1))  # a row that no anchor sees
    theirs, *_ = peer(batch.tokens_RC1, features_RCF, taught_RC)
    ours = dflash_loss(drafter, batch, taught_RC)
    assert relative_error(ours, theirs) < TOLERANCE
    assert_equal_gradients(gradients(ours, drafter.network()), gradients(theirs, model))


def dflash_loss(drafter: Any, batch: SignalBatch, taught_RC: Tensor) -> Tensor:
    ahead_K = torch.arange(1, STEPS + 1)
    place_RNK = batch.anchors_RN[..., None] + ahead_K
    taught_RNK = torch.stack(
        [trained[at] for trained, at in zip(taught_RC, place_RNK, strict=True)]
    )
    weights_RNK = taught_RNK * torch.exp(-(ahead_K - 1) / DFLASH_GAMMA)
    logits_RNKV = drafter.replay(batch)
    losses_M = F.cross_entropy(
        logits_RNKV.flatten(0, 2), batch.paths_RNK.flatten(), reduction="none"
    )
    return (weights_RNK.flatten() * losses_M).sum() / weights_RNK.sum()
