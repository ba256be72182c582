"""What acceptance length weights would have, without serving them.

Letters: R requests, N anchors, K drafted tokens, X teacher width (hidden or vocabulary), V target
vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cosched.teacher import recall
from cosched.training.lora import placed
from cosched.training.micro_step import share_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.engines.sglang.ranks import Ranks
    from cosched.protocols import Drafter
    from cosched.records import SignalBatch, TeacherForm


class Shadow:
    """Scores weights on the network of the trainer's copy, into which they are put for the while.

    So it needs no memory for a second draft, and must not be asked while the trainer is at work. A
    score is the expected acceptance length of an anchor, the bonus token included,

        1 + sum_k prod_{j <= k} a_j,    a_j = sum_v min(p_jv, q_jv)

    with the target's p and the draft's q at the ``temperature`` of the requests: a_j is the chance
    that speculative sampling keeps a token drawn from q (Leviathan et al., arXiv 2211.17192). The
    path is committed text, whose tokens are p's and not min(p, q)'s, so the product is a proxy, the
    same for all weights. Mass outside of the draft's vocabulary is never accepted: p is not
    renormalised over it. At temperature 0, p is certain of its best token and q is taken as at
    temperature 1: a_j is what q gives to that token, which moves before the draft's best one does.

    Weights are rounded to ``served_as``, the type in which they would serve. Of several ``ranks``
    each scores its share of the anchors, and all get the same scores.
    """

    def __init__(
        self,
        copy: Drafter,
        teacher_head: nn.Module,
        teacher_form: TeacherForm,
        served_as: torch.dtype,
        temperature: float = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        network = copy.network()
        assert network is not None, "a drafter without a network has no weights to score"
        self._replay = _Replay(copy, network)
        self._target_ids = copy.target_ids()
        self._teacher_head = teacher_head
        self._teacher_form: TeacherForm = teacher_form
        self._served_as = served_as
        self._temperature = temperature
        self._ranks = ranks

    @torch.no_grad()
    def scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[float]]:
        ranks = self._ranks
        if ranks is None or ranks.size == 1:
            return self._scores(batch, weights)
        parts = ranks.gather(self._scores(share_of(batch, ranks.rank, ranks.size)[0], weights))
        return [[score for part in parts for score in part[i]] for i in range(len(weights))]

    def _scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[float]]:
        """Request by request: logits over a vocabulary are held of one of them only."""
        found: list[list[Tensor]] = [[] for _ in weights]
        for request in range(len(batch.lengths_R)):
            one = _request(batch, request)
            counts_N = one.weights_RNK[0, :, 0] > 0
            p_NKV = self._teacher(one.teacher_RNKX[0])
            for lengths, candidate in zip(found, weights, strict=True):
                lengths.append(self._lengths(one, p_NKV, candidate)[counts_N])
        return [torch.cat(lengths).tolist() for lengths in found]  # host waits for the device

    def _teacher(self, rows_NKX: Tensor) -> Tensor:
        logits = recall(rows_NKX, self._teacher_form, self._teacher_head)
        if self._temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1)
        return self._probabilities(logits)

    def _lengths(self, one: SignalBatch, p_NKV: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        served = {
            f"network.{name}": weight.to(self._served_as).float()
            for name, weight in placed(self._replay.network, weights).items()
        }
        logits_RNKD = functional_call(self._replay, served, (one,))
        q_NKD = self._probabilities(logits_RNKD[0])
        p_NKD = p_NKV if self._target_ids is None else p_NKV[..., self._target_ids]
        kept_NK = torch.minimum(p_NKD, q_NKD).sum(-1)
        return 1 + kept_NK.cumprod(-1).sum(-1)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / (self._temperature or 1.0)).softmax(-1)


class _Replay(nn.Module):
    """A drafter's replay as a module over its network, whose weights can be exchanged for a call."""

    def __init__(self, drafter: Drafter, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._drafter = drafter

    def forward(self, batch: SignalBatch) -> Tensor:
        return self._drafter.replay(batch)


def _request(batch: SignalBatch, index: int) -> SignalBatch:
    """One request of a batch, without the padding of its context."""
    only = slice(index, index + 1)
    length = int(batch.lengths_R[index])  # host waits for the device
    features = batch.features_RCF
    return replace(
        batch,
        starts_R=batch.starts_R[only],
        lengths_R=batch.lengths_R[only],
        tokens_RC1=batch.tokens_RC1[only, : length + 1],
        features_RCF=None if features is None else features[only, :length],
        anchors_RN=batch.anchors_RN[only],
        paths_RNK=batch.paths_RNK[only],
        teacher_RNKX=batch.teacher_RNKX[only],
        weights_RNK=batch.weights_RNK[only],
    )
