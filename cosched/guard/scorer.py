"""What acceptance length weights would have, without serving them.

Letters: R requests, N anchors, K drafted tokens, M rows of one request, X teacher width (hidden or
vocabulary), H width of the draft's states, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cosched.loop.teacher_rows import distinct, recall
from cosched.training.chunks import in_chunks
from cosched.training.lora import placed
from cosched.training.micro_step import share_of
from cosched.training.precision import computing_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.protocols import Drafter
    from cosched.records import Acceptance, SignalBatch, TeacherForm
    from cosched.training.precision import Precision
    from cosched.training.ranks import Ranks

Teacher = Callable[[slice], Tensor]
"""``teacher(rows)``: what the target says in those rows, over the draft's vocabulary ``[M, D]``."""


class AcceptanceScorer:
    """Scores weights on the network of the trainer's copy, into which they are put for the while.

    So it needs no second draft, and must not be asked while the trainer is at work; what does not
    serve in float32 is there in float32 for the while, the weights of one candidate at a time. A
    score is the expected acceptance length of an anchor, the bonus token included,

        1 + sum_k prod_{j <= k} a_j

    where a_j is the chance that drafted token j is accepted, as this engine accepts (``Acceptance``),
    with the target's p and the draft's q at the request's own temperature:

        sampled       sum_v min(p_v, q_v): a token drawn from q is kept by speculative sampling
                      (Leviathan et al., arXiv 2211.17192)
        target_only   p of the draft's best token: that one is drafted, and kept if p draws it
        greedy        1 where the draft's best token is the target's, else 0

    A request at temperature 0 is scored as ``greedy`` whatever the engine does with others: its p is
    all at one token. What a request cuts off besides (top-k, top-p) is left out.

    The path is committed text, whose tokens are p's and not those that were drafted and kept, so the
    product is a proxy, the same for all weights. Mass outside of the draft's vocabulary is never
    accepted: p is not renormalised over it.

    Weights are rounded to ``served_as``, the type in which they would serve. Of several ``ranks``
    each scores its share of the anchors, and all get the same scores. Logits, of the teacher and the
    draft, are made of ``chunk_rows`` rows at a time (``adapt.memory``), or of one request's; matrix
    products are computed in ``precision``.
    """

    def __init__(
        self,
        copy: Drafter,
        teacher_head: nn.Module,
        teacher_form: TeacherForm,
        served_as: torch.dtype,
        acceptance: Acceptance = "sampled",
        ranks: Ranks | None = None,
        chunk_rows: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        network = copy.network()
        assert network is not None, "a drafter without a network has no weights to score"
        self._copy = copy
        self._exchanging = _Exchanging(network)
        self._target_ids = copy.target_ids()
        self._teacher_head = teacher_head
        self._teacher_form: TeacherForm = teacher_form
        self._served_as = served_as
        self._acceptance: Acceptance = acceptance
        self._ranks = ranks
        self.chunk_rows = chunk_rows
        self._computing = computing_in(precision, next(network.parameters()).device)

    busy = False  # scores are there when it returns

    def finished(self) -> None:
        """Nothing is ever under way."""

    def forget(self) -> None:
        """Nothing is ever under way."""

    @torch.no_grad()
    def scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[float]]:
        ranks = self._ranks
        with self._computing:
            if ranks is None or ranks.size == 1:
                parts = [self._scores(batch, weights)]
            else:
                share = share_of(batch, ranks.rank, ranks.size)[0]
                parts = ranks.gather(self._scores(share, weights))
        return [_in_order([part[i] for part in parts]) for i in range(len(weights))]

    def _scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[list[float]]]:
        """Of each of the weights, request by request."""
        found: list[list[list[float]]] = [[] for _ in weights]
        for request in range(len(batch.lengths_R)):
            one = _request(batch, request)
            counts_N = one.weights_RNK[0, :, 0] > 0
            temperature = 1.0 if one.temperatures is None else one.temperatures[0]
            states = partial(self._states, one)
            teacher = self._of_rows(one.teacher_RNKX.flatten(0, 2), temperature)
            for lengths, candidate in zip(found, weights, strict=True):
                kept_M = self.kept(states, teacher, candidate, temperature)
                kept_NK = kept_M.unflatten(0, one.paths_RNK.shape[1:])
                lengths_N = (1 + kept_NK.cumprod(-1).sum(-1))[counts_N]
                lengths.append(lengths_N.tolist())  # host waits for the device
        return found

    def _states(self, one: SignalBatch) -> Tensor:
        return self._copy.replay_states(one).flatten(0, 2)

    def _of_rows(self, rows_MX: Tensor, temperature: float) -> Teacher:
        """``teacher``, of which rows that are alike are recalled once: neighbours' paths overlap."""
        if self.chunk_rows is not None:
            return self.teacher(rows_MX, temperature)
        rows_TX, says_M = distinct(rows_MX, self._teacher_form)
        return self.teacher(rows_TX, temperature)(slice(None))[says_M].__getitem__

    def teacher(self, rows_MX: Tensor, temperature: float = 1.0) -> Teacher:
        """What kept rows of the target say at a temperature, for all weights to be held against.

        Without chunks it is recalled here, once. A chunk is recalled for each of the weights again:
        that is a product with the target's head, and to do it once, all weights would have to be put
        into the network anew for each chunk.
        """
        if self.chunk_rows is None:
            return self._recalled(rows_MX, temperature).__getitem__
        return lambda rows: self._recalled(rows_MX[rows], temperature)

    def _acceptance_at(self, temperature: float) -> Acceptance:
        return self._acceptance if temperature else "greedy"

    def _recalled(self, rows_MX: Tensor, temperature: float) -> Tensor:
        logits = recall(rows_MX, self._teacher_form, self._teacher_head)
        if self._acceptance_at(temperature) == "greedy":
            best = logits.argmax(-1, keepdim=True)
            p_MV = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1)
        else:
            p_MV = _probabilities(logits, temperature)
        return p_MV if self._target_ids is None else p_MV[..., self._target_ids]

    def kept(
        self,
        states: Callable[[], Tensor],
        teacher: Teacher,
        weights: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """The chance a of each row's drafted token to be accepted ``[M]``.

        ``states`` gives what the head is put to ``[M, H]``; it is called with the weights in the
        network.
        """

        def chances(rows: slice, states_MH: Tensor) -> Tensor:
            p_MD, logits_MD = teacher(rows), self._copy.project(states_MH)
            if self._acceptance_at(temperature) != "sampled":
                return p_MD.gather(-1, logits_MD.argmax(-1, keepdim=True))[..., 0]
            return torch.minimum(p_MD, _probabilities(logits_MD, temperature)).sum(-1)

        def kept() -> Tensor:
            return in_chunks(chances, states(), (), self.chunk_rows)

        served = {
            f"network.{name}": weight.to(self._served_as).float()
            for name, weight in placed(self._exchanging.network, weights).items()
        }
        return functional_call(self._exchanging, served, (kept,))


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).softmax(-1)


def _in_order(parts: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Scores of all requests in the order of their anchors, of which each rank has every n-th.

    A block is one of neighbours, so they must stay neighbours.
    """
    return [
        score
        for request in zip(*parts, strict=True)
        for anchors in zip_longest(*request)
        for score in anchors
        if score is not None
    ]


class _Exchanging(nn.Module):
    """Does what it is told, for which the weights of its network can be exchanged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, do: Callable[[], Tensor]) -> Tensor:
        return do()


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
        temperatures=None if batch.temperatures is None else batch.temperatures[only],
    )
