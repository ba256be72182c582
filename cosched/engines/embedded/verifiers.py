"""Who decides what is committed: the target itself, or a text that was recorded or given.

Letters: B requests, K drafted tokens, S = K + 1 rows, V vocabulary, U random numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cosched.engines.embedded.choosing import Best, Drawn, Led
from cosched.engines.embedded.tree_rules import AtRow, KSequential, Recursive, walk, walk_greedy
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
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from cosched.engines.embedded.tree_rules import TreeRule
    from cosched.engines.embedded.trees import Forest, Tree
    from cosched.protocols import Choose
    from cosched.records import Acceptance, Proposal

ForcedKind = Literal["greedy", "sampled", "document"]


class TreeOutcome(NamedTuple):
    """The last row of each request's tree that stands, 0 for its anchor's, and the target's token behind it."""

    rows: list[int]
    next_B: Tensor


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

    def verify_trees(
        self,
        proposal: Proposal,
        forest: Forest,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,
        path_BS: Tensor,
    ) -> TreeOutcome:
        """The same where the drafts are trees."""
        ...


class GreedyVerifier(Verifier):
    """The draft's best token, held against the target's best token."""

    temperature = 0.0

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose:  # noqa: ARG002
        return Best()

    def verify(
        self,
        proposal: Proposal,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,  # noqa: ARG002  the role's signature
        path_BS: Tensor,  # noqa: ARG002
    ) -> Outcome:
        return verify_greedy(proposal.tokens_BK, logits_BSV, offered(proposal))

    def verify_trees(
        self,
        proposal: Proposal,
        forest: Forest,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,  # noqa: ARG002
        path_BS: Tensor,  # noqa: ARG002
    ) -> TreeOutcome:
        return _along(proposal, forest, logits_BSV.argmax(-1))


class SamplingVerifier(Verifier):
    """Drafts are sampled from the draft, and kept so that the target's distribution stands.

    With the acceptance ``target_only`` the draft's best token is drafted instead.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        acceptance: Acceptance = "sampled",
        tree_rule: TreeRule = "recursive",
    ) -> None:
        self.sampling = sampling
        self.temperature = sampling.temperature
        self.acceptance: Acceptance = acceptance
        self.tree_rule: TreeRule = tree_rule

    def choose(self, uniforms_BU: Tensor, path_BK: Tensor) -> Choose:  # noqa: ARG002
        if self.acceptance != "sampled":
            return Best()
        replacement = self.tree_rule == "k_sequential"
        return Drawn(self.sampling, uniforms_BU, replacement)

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

    def verify_trees(
        self,
        proposal: Proposal,
        forest: Forest,
        logits_BSV: Tensor,
        uniforms_BU: Tensor,
        path_BS: Tensor,  # noqa: ARG002
    ) -> TreeOutcome:
        num_drafted = proposal.tokens_BK.shape[1]
        accept_BK = uniforms_BU[:, num_drafted : 2 * num_drafted].to(torch.float32)
        rows: list[int] = []
        following: list[Tensor] = []
        # Each verdict makes the host wait for the device.
        for b, tree in enumerate(forest.trees):
            row, left_V = self._walk(proposal, b, tree, logits_BSV[b], accept_BK[b])
            rows.append(row)
            following.append(draw(left_V, uniforms_BU[b, -1]))
        return TreeOutcome(rows, torch.stack(following))

    def _walk(
        self, proposal: Proposal, b: int, tree: Tree, logits_SV: Tensor, accept_K: Tensor
    ) -> tuple[int, Tensor]:
        drawn = proposal.logits_BKV is not None and self.acceptance == "sampled"

        def at_row(row: int, number: int) -> AtRow:
            p_V = probabilities(logits_SV[row], self.sampling)
            if not drawn or not number:
                return Recursive(p_V, None)
            assert proposal.logits_BKV is not None
            q_V = probabilities(proposal.logits_BKV[b, row], self.sampling, cut=False)
            if self.tree_rule == "k_sequential":
                return KSequential(p_V, q_V, number)
            return Recursive(p_V, q_V)

        tokens = proposal.tokens_BK[b, : len(tree.parents)].tolist()
        return walk(tokens, tree.parents, at_row, lambda k, q, p: bool(accept_K[k] * q < p))


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
    it are the text's. In a document it is judged too low behind one that is not. So it is with trees,
    of which a token stands if it is the text's; one whose tokens were drawn from the draft's distributions
    would have to be drawn again as it is where it leads to this text, and is refused, as are documents.
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
        return Led(path_BK)

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

    def verify_trees(
        self,
        proposal: Proposal,
        forest: Forest,
        logits_BSV: Tensor,  # noqa: ARG002
        uniforms_BU: Tensor,  # noqa: ARG002
        path_BS: Tensor,
    ) -> TreeOutcome:
        self.require_trees_fit(drawn=proposal.logits_BKV is not None)
        return _along(proposal, forest, path_BS.gather(1, forest.depths_BS))

    def require_trees_fit(self, drawn: bool) -> None:
        """Make sure that trees can be judged along this text; ``drawn`` from the draft's distributions.

        Raises:
            ConfigError: they cannot.
        """
        if self.kind == "document":
            raise ConfigError(
                "workload.documents: a tree is judged by text that the target said, which documents are "
                "not; use workload.prompts, or a drafter that drafts chains"
            )
        if self.kind == "sampled" and drawn and self.acceptance == "sampled":
            raise ConfigError(
                "engine.acceptance: a tree drawn from the draft's distributions cannot be judged along "
                "a text that is given, got sampled; use target_only, or a drafter that drafts chains"
            )


def _along(proposal: Proposal, forest: Forest, says_BS: Tensor) -> TreeOutcome:
    """As far as the tree's tokens are those that its rows say."""
    said = says_BS.tolist()  # host waits for the device
    drafted = proposal.tokens_BK.tolist()
    rows = [
        walk_greedy(tokens[: len(tree.parents)], tree.parents, says)
        for tree, tokens, says in zip(forest.trees, drafted, said, strict=True)
    ]
    at_B1 = torch.tensor(rows, device=says_BS.device)[:, None]
    return TreeOutcome(rows, says_BS.gather(1, at_B1).squeeze(1))
