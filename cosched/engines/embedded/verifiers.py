"""Who decides what is committed: the target itself, or a text that was recorded or given.

Letters: B requests, K drafted tokens, S = K + 1 rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from cosched.engines.embedded.verification import (
    Outcome,
    SamplingParams,
    drafted_from,
    draw,
    offered,
    probabilities,
    verify_greedy,
    verify_sampled,
)

if TYPE_CHECKING:
    from cosched.protocols import Choose
    from cosched.records import Acceptance, Proposal

ForcedKind = Literal["greedy", "sampled", "document"]


class Verifier(Protocol):
    """Picks drafted tokens and rules on them; ``uniforms_BU`` has 2K + 1 numbers a request."""

    temperature: float  # at which drafts are accepted: 0 where only the target's best token is

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose: ...

    def tokens(self, proposal: Proposal, path_BK: Tensor) -> Tensor:
        """The K tokens that the target's rows stand behind, and of which the accepted are committed."""
        del path_BK
        return proposal.tokens_BK

    def verify(
        self, proposal: Proposal, logits_BSV: Tensor, uniforms_BU: Tensor, path_BS: Tensor
    ) -> Outcome: ...


class GreedyVerifier(Verifier):
    """The draft's best token, held against the target's best token."""

    temperature = 0.0

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose:  # noqa: ARG002
        return lambda _k, logits_BV: logits_BV.argmax(-1)

    def verify(
        self,
        proposal: Proposal,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,  # noqa: ARG002  the role's signature
        path_BS: Tensor,  # noqa: ARG002
    ) -> Outcome:
        return verify_greedy(proposal.tokens_BK, logits_BSV, offered(proposal))


class SamplingVerifier(Verifier):
    """Drafts are sampled from the draft, and kept so that the target's distribution stands.

    With the acceptance ``target_only`` the draft's best token is drafted instead.
    """

    def __init__(self, sampling: SamplingParams, acceptance: Acceptance = "sampled") -> None:
        self.sampling = sampling
        self.temperature = sampling.temperature
        self.acceptance: Acceptance = acceptance

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose:  # noqa: ARG002
        if self.acceptance != "sampled":
            return lambda _k, logits_BV: logits_BV.argmax(-1)

        def pick(k: int, logits_BV: Tensor) -> Tensor:
            return draw(probabilities(logits_BV, self.sampling, cut=False), uniforms_BU[:, k])

        return pick

    def verify(
        self,
        proposal: Proposal,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,
        path_BS: Tensor,  # noqa: ARG002
    ) -> Outcome:
        num_drafted = proposal.tokens_BK.shape[1]
        p_BSV = probabilities(logits_BSV, self.sampling)
        return verify_sampled(
            proposal.tokens_BK,
            drafted_from(proposal, self.sampling, self.acceptance, p_BSV[:, :-1]),
            p_BSV,
            uniforms_BU[:, num_drafted : 2 * num_drafted].to(torch.float32),
            uniforms_BU[:, -1],
            offered(proposal),
        )


class ForcedVerifier(Verifier):
    """The text is given; the draft is led along it and judged by its chance of being accepted.

    ``greedy``    stands while the draft's best token is the text's: exact for greedy text.
    ``sampled``   stands with probability min(1, q(x) / p(x)): exact for text sampled from p, since
                  P(draft x accepted) = min(p(x), q(x)) and P(x committed) = p(x).
    ``document``  stands with probability sum_v min(p, q), which is what a sampled draft would meet
                  at this place; the text was not the target's, so this is its nearest measure.

    With the acceptance ``target_only`` the draft's best token has q = 1 and all others 0: sampled text
    accepts it where the text is that token, and a document with its probability p.

    A draft without distributions cannot be led: it goes by tokens of its own, each with q = 1. Where
    text is greedy or sampled it is exact all the same, for a row counts only where all drafts before
    it are the text's. In a document it is judged too low behind one that is not.
    """

    def __init__(
        self, kind: ForcedKind, sampling: SamplingParams, acceptance: Acceptance = "sampled"
    ) -> None:
        self.kind = kind
        self.acceptance: Acceptance = acceptance
        # Documents have no temperature of their own: judge the distributions as they are.
        self.sampling = SamplingParams(1.0) if sampling.greedy else sampling
        self.temperature = 0.0 if kind == "greedy" else self.sampling.temperature

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose:  # noqa: ARG002
        return lambda k, _logits_BV: path_BK[:, k]

    def tokens(self, proposal: Proposal, path_BK: Tensor) -> Tensor:  # noqa: ARG002
        return path_BK

    def verify(
        self, proposal: Proposal, logits_BSV: Tensor, uniforms_BU: Tensor, path_BS: Tensor
    ) -> Outcome:
        path_BK = path_BS[:, :-1]
        if self.kind == "greedy":
            logits_BKV = proposal.logits_BKV
            best_BK = proposal.tokens_BK if logits_BKV is None else logits_BKV.argmax(-1)
            stands_BK = best_BK == path_BK
        else:
            p_BKV = probabilities(logits_BSV[:, :-1], self.sampling)
            q_BKV = drafted_from(proposal, self.sampling, self.acceptance, p_BKV)
            num_drafted = path_BK.shape[1]
            uniform_BK = uniforms_BU[:, num_drafted : 2 * num_drafted].to(torch.float32)
            if self.kind == "document":
                stands_BK = uniform_BK < torch.minimum(p_BKV, q_BKV).sum(-1)
            else:
                at = path_BK[..., None]
                stands_BK = uniform_BK * p_BKV.gather(-1, at)[..., 0] < q_BKV.gather(-1, at)[..., 0]
        num_accepted_B = (offered(proposal) & stands_BK).long().cumprod(1).sum(1)
        return Outcome(num_accepted_B, path_BS.gather(1, num_accepted_B[:, None]).squeeze(1))
