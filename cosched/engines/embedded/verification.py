"""Lossless verification: which drafted tokens stand, and what the target says instead.

Letters: B requests, K drafted tokens, S = K + 1 rows, V vocabulary.

Greedy: a draft stands while it equals the target's argmax. Sampling: speculative sampling
(Leviathan et al., arXiv 2211.17192): draft d stands with probability min(1, p(d) / q(d)); after the
first refusal the next token is drawn from max(p - q, 0), which makes the whole exactly p. A draft
that was proposed without a distribution has q(d) = 1: it stands with probability p(d), and after its
refusal the next token is drawn from p without d. So has the draft's best token where that one is drafted
(``target_only``), as SGLang does it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cosched.records import Acceptance, Proposal


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Temperature 0 is greedy. ``top_p`` cuts the target's distribution, not the draft's."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """``num_accepted_B`` drafts stand; ``next_B`` is the target's own token after them."""

    num_accepted_B: Tensor
    next_B: Tensor


def probabilities(logits: Tensor, sampling: SamplingParams, cut: bool = True) -> Tensor:
    """Sampling distribution of ``logits [..., V]``, float32; ``cut`` applies top-p."""
    probs = (logits / sampling.temperature).softmax(-1)
    if not cut or sampling.top_p >= 1.0:
        return probs
    ordered, index = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # a token stays if the mass before it is below top_p
    kept = torch.where(before < sampling.top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, index, kept / kept.sum(-1, keepdim=True))


def drafted_from(
    proposal: Proposal, sampling: SamplingParams, acceptance: Acceptance, p_BKV: Tensor
) -> Tensor:
    """What drafted tokens were drawn from ``[B, K, V]``; ``p_BKV``, which judges them, gives the shape.

    All of it lies on the token itself where the drafter has no distribution, and on its best one where
    that is what was drafted (``target_only``).
    """
    if proposal.logits_BKV is None:
        certain_BK = proposal.tokens_BK
    elif acceptance == "sampled":
        return probabilities(proposal.logits_BKV, sampling, cut=False)
    else:
        certain_BK = proposal.logits_BKV.argmax(-1)
    return torch.zeros_like(p_BKV).scatter(-1, certain_BK[..., None], 1.0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn in proportion to ``weights [..., V]`` by inversion of ``uniform [...]``."""
    cumulative = weights.double().cumsum(-1)
    threshold = uniform.double()[..., None] * cumulative[..., -1:]
    # right=True skips entries of weight zero, whose cumulative sum equals that of the one before.
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return index.clamp_max(weights.shape[-1] - 1)


def offered(proposal: Proposal) -> Tensor:
    """Which drafted tokens are verified ``[B, K]``: all, unless the proposal counts them."""
    tokens_BK = proposal.tokens_BK
    if proposal.counts is None:
        return torch.ones_like(tokens_BK, dtype=torch.bool)
    counts_B1 = tokens_BK.new_tensor(proposal.counts)[:, None]
    return torch.arange(tokens_BK.shape[1], device=tokens_BK.device) < counts_B1


def verify_greedy(drafted_BK: Tensor, logits_BSV: Tensor, offered_BK: Tensor) -> Outcome:
    """Longest prefix of drafts that equals the target's argmax, and the argmax after it."""
    says_BS = logits_BSV.argmax(-1)
    stands_BK = (offered_BK & (drafted_BK == says_BS[:, :-1])).long()
    num_accepted_B = stands_BK.cumprod(1).sum(1)
    return Outcome(num_accepted_B, says_BS.gather(1, num_accepted_B[:, None]).squeeze(1))


def verify_sampled(
    drafted_BK: Tensor,
    q_BKV: Tensor,
    p_BSV: Tensor,
    accept_BK: Tensor,
    draw_B: Tensor,
    offered_BK: Tensor,
) -> Outcome:
    """Speculative sampling from given uniforms: ``accept_BK`` for the tests, ``draw_B`` for the draw.

    Behind the last token that is offered the next one is drawn from p itself.
    """
    at = drafted_BK[..., None]
    p_BK = p_BSV[:, :-1].gather(-1, at).squeeze(-1)
    q_BK = q_BKV.gather(-1, at).squeeze(-1)
    stands_BK = (offered_BK & (accept_BK * q_BK < p_BK)).long()
    num_accepted_B = stands_BK.cumprod(1).sum(1)
    row = num_accepted_B[:, None, None].expand(-1, 1, p_BSV.shape[-1])
    p_BV = p_BSV.gather(1, row).squeeze(1)
    nothing = torch.zeros_like(p_BSV[:, :1])
    q_BV = torch.cat((q_BKV, nothing), 1).gather(1, row).squeeze(1)
    all_stand_B = num_accepted_B == offered_BK.sum(1)
    q_BV = q_BV.masked_fill(all_stand_B[:, None], 0)
    residual_BV = (p_BV - q_BV).clamp_min(0)
    # p == q to the last bit leaves no residual; then p itself is what is left to draw from.
    residual_BV = torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV, p_BV)
    return Outcome(num_accepted_B, draw(residual_BV, draw_B))


class RandomStream:
    """Uniform numbers of one request, by position of the text and purpose.

    They depend on the seed, the request and the position alone, so a request draws the same
    numbers whatever else is in the batch, and arms that stand at the same position share them.
    """

    def __init__(self, seed: int, request_id: str) -> None:
        digest = hashlib.sha256(f"{seed}\0{request_id}".encode()).digest()
        self._base = int.from_bytes(digest[:7], "big")
        self._generator = torch.Generator()

    def uniforms(self, position: int, count: int) -> Tensor:
        """``[count]`` float64 numbers in [0, 1) for the round that starts at ``position``."""
        self._generator.manual_seed((self._base + position * 0x9E3779B97F4A7C15) % 2**63)
        return torch.rand(count, dtype=torch.float64, generator=self._generator)
