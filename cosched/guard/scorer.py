"""What acceptance length weights would have, without serving them.

Letters: R requests, N anchors, K drafted tokens, M rows that count, T teacher rows that differ, X
teacher width (hidden or vocabulary), H width of the draft's states, V target vocabulary, D draft
vocabulary, W candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cosched.loop.layout import counted_rows, upload
from cosched.loop.teacher_rows import recall
from cosched.training.chunks import in_chunks
from cosched.training.lora import placed
from cosched.training.precision import computing_in, product_type
from cosched.training.shares import share_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cosched.loop.layout import CountedRows
    from cosched.protocols import Drafter
    from cosched.records import Acceptance, SignalBatch, TeacherForm
    from cosched.training.precision import Precision
    from cosched.training.ranks import Ranks

Teacher = Callable[[slice], Tensor]
"""``teacher(rows)``: what the target says in those rows, over the draft's vocabulary ``[M, D]``."""


@dataclass(frozen=True, slots=True)
class RowTemperatures:
    """At what rows sample: ``of_M1``, None where all do at 1; ``greedy_M1`` are those at 0.

    None where none is; ``all_greedy`` where no other is.
    """

    of_M1: Tensor | None = None
    greedy_M1: Tensor | None = None
    all_greedy: bool = False

    def at(self, rows: slice | Tensor) -> RowTemperatures:
        """Those of some of the rows."""
        of, greedy = self.of_M1, self.greedy_M1
        return RowTemperatures(
            None if of is None else of[rows],
            None if greedy is None else greedy[rows],
            self.all_greedy,
        )

    def probabilities(self, logits_MV: Tensor) -> Tensor:
        """Of each token ``[M, V]``, in float32; a greedy row's are all at its best one."""
        if self.all_greedy:
            best_M1 = logits_MV.argmax(-1, keepdim=True)
            return torch.zeros_like(logits_MV, dtype=torch.float32).scatter_(-1, best_M1, 1)
        wide_MV = logits_MV.float()
        p_MV = (wide_MV if self.of_M1 is None else wide_MV / self.of_M1).softmax(-1)
        if self.greedy_M1 is not None:
            best_M1 = logits_MV.argmax(-1, keepdim=True)
            at_best_M1 = torch.where(self.greedy_M1, 1.0, p_MV.gather(-1, best_M1))
            p_MV.masked_fill_(self.greedy_M1, 0).scatter_(-1, best_M1, at_best_M1)
        return p_MV


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
    each scores its share of the anchors, and all get the same scores. All requests are one batch, so
    that weights are put in once, and the host waits for the device once, at the end. Logits, of the
    teacher and the draft, are made of ``chunk_rows`` rows at a time (``adapt.memory``); matrix
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
        device = next(network.parameters()).device
        self._computing = computing_in(precision, device)
        # Weights of linear layers that serve in the type of their products stay in it: autocast keeps
        # what it has rounded of parameters that are trained, and would round these at every use.
        stay = product_type(precision, device) == served_as
        linear = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)]
        self._staying = frozenset(f"{name}.weight" for name in linear if stay)

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
                share = share_of(batch, ranks.rank, ranks.size).batch
                parts = ranks.gather(self._scores(share, weights))
        return [_in_order([part[i] for part in parts]) for i in range(len(weights))]

    def _scores(
        self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]
    ) -> list[list[list[float]]]:
        """Of each of the weights, request by request."""
        table_WRN = self.lengths(batch, weights)
        counts, *found = table_WRN.tolist()  # host waits for the device
        return [
            [
                [length for length, counts_ in zip(*anchors, strict=True) if counts_]
                for anchors in zip(one, counts, strict=True)
            ]
            for one in found
        ]

    def lengths(self, batch: SignalBatch, weights: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Which anchors count, and the score of each with each of the weights ``[1 + W, R, N]``."""
        rows = counted_rows(batch, self._teacher_form)
        at = self._temperatures(batch, rows.places_M)
        teacher = self._teacher(batch, rows, at)
        counts_RN = batch.weights_RNK[..., 0] > 0

        def states() -> Tensor:
            return self._copy.replay_states(batch).flatten(0, 2).index_select(0, rows.places_M)

        lengths: list[Tensor] = []
        for candidate in weights:
            kept_M = self.kept(states, teacher, candidate, at)
            kept = kept_M.new_zeros(batch.weights_RNK.numel()).index_copy_(0, rows.places_M, kept_M)
            kept_RNK = kept.unflatten(0, batch.weights_RNK.shape)
            lengths.append(1 + kept_RNK.cumprod(-1).sum(-1))
        return torch.stack((counts_RN.to(lengths[0].dtype), *lengths))

    def _teacher(self, batch: SignalBatch, rows: CountedRows, at: RowTemperatures) -> Teacher:
        """Without chunks it is recalled here, once, and once of rows that are alike.

        A chunk is recalled for each of the weights again: that is a product with the target's head, and
        to do it once, all weights would have to be put into the network anew for each chunk.
        """
        if self.chunk_rows is None:
            at_T = self._temperatures(batch, rows.first_T)
            return self._recalled(rows.teacher_TX, at_T)[rows.says_M].__getitem__
        rows_MX = rows.teacher_TX[rows.says_M]
        return lambda chunk: self._recalled(rows_MX[chunk], at.at(chunk))

    def _temperatures(self, batch: SignalBatch, places_M: Tensor) -> RowTemperatures:
        """Those of rows, by their places among all; all greedy where the engine is."""
        each_R = np.ones(1) if batch.temperatures is None else np.array(batch.temperatures)
        if self._acceptance == "greedy" or not each_R.any():
            return RowTemperatures(all_greedy=True)
        if (each_R == 1).all():
            return RowTemperatures()
        of_R1 = upload(each_R.astype(np.float32)[:, None], places_M.device)
        greedy_R1 = None if each_R.all() else of_R1 == 0
        sampled_R1 = of_R1 if greedy_R1 is None else of_R1.masked_fill(greedy_R1, 1)
        request_M = places_M // batch.weights_RNK[0].numel()
        return RowTemperatures(sampled_R1, greedy_R1).at(request_M)

    def _recalled(self, rows_MX: Tensor, at: RowTemperatures) -> Tensor:
        p_MV = at.probabilities(recall(rows_MX, self._teacher_form, self._teacher_head))
        return p_MV if self._target_ids is None else p_MV[..., self._target_ids]

    def kept(
        self,
        states: Callable[[], Tensor],
        teacher: Teacher,
        weights: Mapping[str, Tensor],
        at: RowTemperatures,
    ) -> Tensor:
        """The chance a of each row's drafted token to be accepted ``[M]``.

        ``states`` gives what the head is put to ``[M, H]``; it is called with the weights in the
        network.
        """

        def chances(rows: slice, states_MH: Tensor) -> Tensor:
            p_MD, logits_MD = teacher(rows), self._copy.project(states_MH)
            if self._acceptance != "sampled" or at.all_greedy:
                return p_MD.gather(-1, logits_MD.argmax(-1, keepdim=True))[..., 0]
            return torch.minimum(p_MD, at.at(rows).probabilities(logits_MD)).sum(-1)

        def kept() -> Tensor:
            return in_chunks(chances, states(), (), self.chunk_rows)

        served: dict[str, Tensor] = {}
        for name, weight in placed(self._exchanging.network, weights).items():
            rounded = weight.to(self._served_as)
            served[f"network.{name}"] = rounded if name in self._staying else rounded.float()
        return functional_call(self._exchanging, served, (kept,))


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
