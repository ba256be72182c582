"""Scores of drafts on held-out rows: the engine's own expected acceptance, shared by ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from cosched.guard.scorer import AcceptanceScorer
from cosched.loop.checksum import checksum
from cosched.loop.layout import first_places
from cosched.records import Acceptance, SignalBatch
from cosched.testing.harness import collected, make_requests, make_target, serve
from tests.helpers.drafts import make_drafter


@pytest.fixture(scope="module")
def scene() -> tuple[Any, Any, SignalBatch]:
    target = make_target()
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=60)
    batch = collected(
        target, drafter, "delayed", None, serve(target, drafter, requests, max_batch=3)
    )
    assert batch is not None
    assert batch.temperatures == (0, 0, 0)  # they were served greedily
    return target, drafter, replace(batch, temperatures=None)


def scorer_of(target, drafter, dtype=torch.float32, ranks=None) -> AcceptanceScorer:
    copy = drafter.clone(torch.float32)
    return AcceptanceScorer(copy, target.head, "hidden", dtype, ranks=ranks)


@pytest.mark.parametrize(
    ("acceptance", "temperatures"),
    [
        ("greedy", (1.0, 1.0, 0.7)),
        ("target_only", (0.7, 0.0, 1.3)),
        ("sampled", (0.7, 1.0, 0.0)),
        ("sampled", None),
    ],
)
@pytest.mark.parametrize("reduced", [False, True])
def test_scores_are_the_chained_acceptance(
    scene, acceptance: Acceptance, temperatures: tuple[float, ...] | None, reduced: bool
) -> None:
    """As the engine accepts, each request at its own temperature, and greedily those at 0 whatever the
    engine does: of other weights than the network has, anchor by anchor, against loops in float64; p is not renormalised over a reduced vocabulary, and afterwards the network is what it was."""
    target, drafter, batch = scene
    other = drafter.clone(torch.float32)
    ids = torch.arange(0, target.vocab_size, 2) if reduced else None
    generator = torch.Generator().manual_seed(0)
    for parameter in other.network().parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    weights = dict(other.network().named_parameters())
    copy = drafter.clone(torch.float32)
    q_logits = other.replay(batch).double()
    if ids is not None:
        copy.target_ids = lambda: ids
        whole, project = q_logits, copy.project
        q_logits, copy.project = whole[..., ids], lambda states: project(states)[..., ids]
    before = checksum(dict(copy.network().named_parameters()))
    scorer = AcceptanceScorer(copy, target.head, "hidden", torch.float32, acceptance)
    batch = replace(batch, temperatures=temperatures)
    found = scorer.scores(batch, [weights])[0]
    assert checksum(dict(copy.network().named_parameters())) == before

    p_logits = target.head(batch.teacher_RNKX).double()
    expected = []
    for r, n in (batch.weights_RNK[..., 0] > 0).nonzero().tolist():
        length, reached = 1.0, 1.0
        for k in range(drafter.num_draft_tokens):
            p, q = p_logits[r, n, k], q_logits[r, n, k]
            best = int(q.argmax()) if ids is None else int(ids[q.argmax()])
            temperature = temperatures[r] if temperatures else 1.0
            if acceptance == "greedy" or temperature == 0:
                reached *= best == int(p.argmax())
            elif acceptance == "target_only":
                reached *= float((p / temperature).softmax(-1)[best])
            else:
                p, q = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
                pairs = zip(p if ids is None else p[ids], q, strict=True)
                reached *= sum(min(float(a), float(b)) for a, b in pairs)
            length += reached
        expected.append(length)
    assert found == pytest.approx(expected, rel=1e-4)  # the network and the head are float32


def test_of_fewer_places_the_score_is_that_of_a_shorter_draft(scene) -> None:
    """The first alone: 1 + sum_v min(p_v, q_v); each more adds what it adds, and all of them are the whole."""
    target, drafter, batch = scene
    scorer, weights = scorer_of(target, drafter), dict(drafter.network().named_parameters())
    found = [
        torch.tensor(scorer.scores(first_places(batch, places), [weights])[0])
        for places in range(1, drafter.num_draft_tokens + 1)
    ]
    p, q = (
        logits[:, :, 0].double().softmax(-1)
        for logits in (target.head(batch.teacher_RNKX), drafter.replay(batch))
    )
    counts = batch.weights_RNK[..., 0] > 0
    first = 1 + torch.minimum(p, q).sum(-1)[counts]
    torch.testing.assert_close(found[0].double(), first, rtol=1e-4, atol=1e-4)
    assert all((more > fewer).all() for fewer, more in pairwise(found))
    assert found[-1].tolist() == scorer.scores(batch, [weights])[0]


def test_what_would_be_served_is_scored(scene) -> None:
    """Rounded to the type in which the draft serves: bfloat16 masks what is smaller."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    rounded = {name: p.bfloat16().float() for name, p in weights.items()}
    plain = scorer_of(target, drafter).scores(batch, [weights, rounded])
    as_served = scorer_of(target, drafter, torch.bfloat16).scores(batch, [weights, rounded])
    assert as_served[0] == as_served[1] == plain[1] != plain[0]


def test_ranks_share_the_work_and_have_the_same_scores(scene) -> None:
    """Each scores every second anchor; all get all of them, in the order that one would."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    parts: dict[int, Any] = {}

    class Rank:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, mine: Any) -> list[Any]:
            parts[self.rank] = mine
            return [parts.get(0, mine), parts.get(1, mine)]

    scorers = [scorer_of(target, drafter, ranks=Rank(rank)) for rank in (0, 1)]
    for scorer in scorers:
        scorer.scores(batch, [weights, weights])
    first, second = (scorer.scores(batch, [weights, weights]) for scorer in scorers)
    assert first == second
    alone = scorer_of(target, drafter).scores(batch, [weights])[0]
    assert first[1] == pytest.approx(alone, rel=1e-5)
    assert 0 < len(parts[0][0]) < len(alone)


@pytest.mark.parametrize("acceptance", ["sampled", "target_only"])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_requests_score_together_what_they_score_alone(
    scene, acceptance: Acceptance, chunk_rows: int | None
) -> None:
    """One padded batch for all requests, each at its own temperature, and a pass for each of them."""
    target, drafter, batch = scene
    batch = replace(batch, temperatures=(0.0, 0.7, 1.0))
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    copy = drafter.clone(torch.float32)
    scorer = AcceptanceScorer(
        copy, target.head, "hidden", torch.float32, acceptance, chunk_rows=chunk_rows
    )
    together, *_ = scorer.scores(batch, [weights, weights])
    alone: list[float] = []
    for request in range(len(batch.lengths_R)):
        only, length = slice(request, request + 1), int(batch.lengths_R[request])
        one = replace(
            batch,
            **{
                name: getattr(batch, name)[only]
                for name in ("starts_R", "lengths_R", "anchors_RN", "paths_RNK", "teacher_RNKX")
            },
            weights_RNK=batch.weights_RNK[only],
            tokens_RC1=batch.tokens_RC1[only, : length + 1],
            features_RCF=batch.features_RCF[only, :length],
            temperatures=batch.temperatures[only],
        )
        alone += scorer.scores(one, [weights])[0]
    assert together == pytest.approx(alone, rel=1e-5)  # float32 sums of other shapes


def test_weights_that_serve_in_the_type_of_products_stay_in_it(scene) -> None:
    """Autocast would round them at every use again; the scores are those of float32 but for rounding
    to 8 bits, 0.4 % a product."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    copy = drafter.clone(torch.float32)
    exact = AcceptanceScorer(copy, target.head, "hidden", torch.bfloat16)
    fast = AcceptanceScorer(copy, target.head, "hidden", torch.bfloat16, precision="bfloat16")
    assert "fc.weight" in fast._staying
    assert not exact._staying
    (found,), (expected,) = fast.scores(batch, [weights]), exact.scores(batch, [weights])
    assert found == pytest.approx(expected, rel=0.1)
    assert sum(found) == pytest.approx(sum(expected), rel=0.01)
