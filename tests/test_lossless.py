"""Adaptation never changes what the target would have said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from scipy.stats import chisquare

from cosched.engines.embedded.verification import (
    Outcome,
    RandomStream,
    SamplingParams,
    draw,
    probabilities,
)
from cosched.engines.embedded.verifiers import ForcedVerifier, SamplingVerifier
from cosched.engines.request import GenerationRequest
from cosched.protocols import DrafterSettings
from cosched.records import Proposal
from cosched.testing.harness import (
    Watcher,
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)
from cosched.testing.sampling import (
    FALSE_ALARM,
    VOCABULARY,
    p_value,
    p_values,
    sampling_target,
)
from cosched.workload.prompt_files import read_lines
from drafters.eagle3 import Eagle3Drafter
from tests.helpers.drafts import Lookup, make_drafter

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.engines.embedded.verifiers import ForcedKind
    from cosched.records import Acceptance


@pytest.fixture(scope="module")
def answers(tiny_target: Target, tinyworld: Path) -> tuple[list[GenerationRequest], dict]:
    """Four prompts of foreign text, and what the trained target says to them by itself: 2,048 tokens."""
    lines = read_lines(tinyworld / "prompts" / "translated.jsonl", "prompts")[:4]
    tokenizer = tiny_target.tokenizer
    requests = [
        GenerationRequest(line.id, torch.tensor(tokenizer(line.text)["input_ids"]), 512)
        for line in lines
    ]
    return requests, decode(make_engine(tiny_target, None, requests, 4), requests)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("max_batch", [1, 4])
def test_greedy_equals_plain_on_the_tiny_world(
    tiny_target: Target, tinyworld: Path, answers, max_batch: int
) -> None:
    """The same on trained models, where drafts are accepted often, and whatever else is in the batch:
    1,024 tokens one request at a time, 2,048 in a batch, frozen and while it learns."""
    requests, plain = answers
    requests = requests if max_batch > 1 else requests[:2]
    plain = {request.id: plain[request.id] for request in requests}
    settings = DrafterSettings(kind="eagle3", path=str(tinyworld / "eagle3"))
    for adapted in (False, True):
        drafter = Eagle3Drafter.load(settings, tiny_target)
        observer = make_coscheduler(tiny_target, drafter, every=16) if adapted else None
        engine = make_engine(tiny_target, drafter, requests, max_batch, observer=observer)
        assert decode(engine, requests) == plain


def test_stop_token_ends_inside_a_block(target: Target) -> None:
    """A stop token that a draft hits ends the text there, whatever was accepted behind it."""
    requests = make_requests(target, count=3, prompt=6, new=120)
    free = decode(make_engine(target, None, requests), requests)
    stop = frozenset({free["r0"][40]})
    plain = decode(make_engine(target, None, requests, stop_tokens=stop), requests)
    drafter = make_drafter(target)
    observer = make_coscheduler(target, drafter, every=5, lr=3e-3)
    engine = make_engine(
        target, drafter, requests, max_batch=3, stop_tokens=stop, observer=observer
    )
    assert decode(engine, requests) == plain
    assert len(plain["r0"]) <= 41


# --- sampling: chi-square against exact probabilities, see cosched.testing.sampling ---------


class AcceptAll(SamplingVerifier):
    """A broken verifier: every draft is accepted."""

    def verify(self, proposal: Proposal, logits_BSV, uniforms_BU, path_BS) -> Outcome:
        last = probabilities(logits_BSV[:, -1], self.sampling)
        count = torch.full((len(last),), proposal.tokens_BK.shape[1])
        return Outcome(count, draw(last, uniforms_BU[:, -1]))


class Scrambler:
    """An observer that replaces the draft's head after every round: the hardest publication."""

    version = 0

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.generator = torch.Generator().manual_seed(5)

    def on_round(self, _round: object) -> None:
        weight = self.network.lm_head.weight
        weight.data.copy_(torch.randn(weight.shape, generator=self.generator) * 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("updates", ["trained", "none", "scrambled"])
@pytest.mark.parametrize("sampling", [SamplingParams(1.0), SamplingParams(0.7, top_p=0.8)])
@pytest.mark.parametrize("acceptance", ["sampled", "target_only"])
def test_sampling_follows_the_target(
    sampling: SamplingParams, updates: str, acceptance: Acceptance
) -> None:
    """Sampled text has the target's exact distribution, cut or not, whatever the draft becomes, and
    whether it proposes samples or its best tokens."""
    target = sampling_target()
    drafter = make_drafter(target, num_draft_tokens=2)
    observer = None
    if updates == "trained":
        observer = make_coscheduler(target, drafter, every=2, lr=3e-3)
    elif updates == "scrambled":
        observer = Scrambler(drafter.network())
    verifier = SamplingVerifier(sampling, acceptance)
    found = p_values(target, drafter, verifier, sampling, observer)
    assert min(found) > FALSE_ALARM


def test_the_chi_square_test_can_fail() -> None:
    """A verifier that accepts every draft is caught at once."""
    target, sampling = sampling_target(), SamplingParams(1.0)
    drafter = make_drafter(target, num_draft_tokens=2)
    found = p_values(target, drafter, AcceptAll(sampling), sampling, num_draws=600)
    assert min(found) < 1e-12


# --- drafts without a distribution ---------------------------------------------------------


@pytest.mark.parametrize("max_batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_greedy_text_with_tokens_alone_is_the_targets(target: Target, max_batch: int) -> None:
    """Greedy verification asks for no logits, and drafts are accepted and refused on the way."""
    requests = make_requests(target, count=4, prompt=6, new=80)
    watcher = Watcher()
    drafter = Lookup(target.vocab_size)
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher)
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    accepted = [block.num_accepted for round_ in watcher.rounds for block in round_.blocks]
    assert {0, drafter.num_draft_tokens} <= set(accepted)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(1.0), marks=pytest.mark.slow),
        SamplingParams(0.7, top_p=0.8),
    ],
)
def test_sampling_with_tokens_alone_follows_the_target(sampling: SamplingParams) -> None:
    """Token d stands with probability p(d), and what follows its refusal is drawn from the rest."""
    target = sampling_target()
    found = p_values(target, Lookup(VOCABULARY, 2), SamplingVerifier(sampling), sampling)
    assert min(found) > FALSE_ALARM


def test_a_token_without_a_distribution_is_accepted_as_often_as_it_is_likely() -> None:
    """Over a grid of all uniform numbers: d is committed with probability p(d), and so is any other.

    A grid of n points meets an interval within 1 / n of its length, on both of its sides.
    """
    n, p_V = 400, torch.tensor([0.1, 0.5, 0.0, 0.4])
    logits_BSV = p_V.log().expand(n * n, 2, -1)
    grid = (torch.arange(n) + 0.5) / n
    uniforms_BU = torch.cartesian_prod(grid, grid)  # to accept, and to draw
    uniforms_BU = torch.cat((uniforms_BU[:, :1], uniforms_BU), 1)  # one for a choice nobody makes
    for d in range(4):
        proposal = Proposal(torch.full((n * n, 1), d))
        outcome = SamplingVerifier(SamplingParams(1.0)).verify(
            proposal, logits_BSV, uniforms_BU, torch.zeros(n * n, 2)
        )
        accepted_B = outcome.num_accepted_B == 1
        assert float(accepted_B.float().mean()) == pytest.approx(float(p_V[d]), abs=2 / n)
        committed_B = torch.where(accepted_B, d, outcome.next_B)
        share_V = committed_B.bincount(minlength=4) / n**2
        assert torch.allclose(share_V, p_V, atol=4 / n)
        assert not bool((outcome.next_B[~accepted_B] == d).any())


@pytest.mark.parametrize("kind", ["greedy", "sampled", "document"])
def test_tokens_alone_do_not_change_a_given_text(target: Target, kind: ForcedKind) -> None:
    """A text that is given is committed, though a draft that cannot be led says something else."""
    generator = torch.Generator().manual_seed(1)
    text_T = torch.randint(1, 6, (70,), generator=generator)  # few words: some are guessed
    request = GenerationRequest("given", text_T[:8], 62, text_T)
    watcher = Watcher()
    verifier = ForcedVerifier(kind, SamplingParams(1.0))
    drafter = Lookup(target.vocab_size)
    engine = make_engine(target, drafter, [request], verifier=verifier, observer=watcher)
    assert decode(engine, [request])["given"] == text_T[8:].tolist()
    blocks = [block for round_ in watcher.rounds for block in round_.blocks]
    assert all(s.refused is None for round_ in watcher.rounds for s in round_.segments)
    if kind != "document":  # whose text stands by chance
        assert 0 < sum(block.num_accepted for block in blocks) < 3 * len(blocks)


@pytest.mark.parametrize("kind", ["sampled", "document"])
def test_the_best_token_is_accepted_as_often_as_the_target_says_it(kind: ForcedKind) -> None:
    """Led along a given text, with acceptance target-only, at a temperature of its own.

    Over the text of a row, drawn from p, the draft's best token is met with probability p of it; in a
    document it stands with that probability, whatever the text is.
    """
    n, sampling = 20_000, SamplingParams(0.7)
    p_V = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits_BSV = (p_V.log() * sampling.temperature).expand(n, 2, -1)
    proposal = Proposal(
        torch.zeros(n, 1, dtype=torch.int64), torch.tensor([0.0, 1, 2, 3]).expand(n, 1, 4)
    )
    generator = torch.Generator().manual_seed(0)
    uniforms_BU = torch.rand(n, 3, generator=generator)
    path_BS = p_V.multinomial(2 * n, replacement=True, generator=generator).view(n, 2)
    verifier = ForcedVerifier(kind, sampling, "target_only")
    accepted = verifier.verify(proposal, logits_BSV, uniforms_BU, path_BS).num_accepted_B.double()
    # Four standard errors of a share.
    assert float(accepted.mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


def test_p_values_are_those_of_scipy() -> None:
    """A second implementation agrees, to the last digits of its own."""
    generator = torch.Generator().manual_seed(0)
    observed = torch.randint(5, 40, (20,), generator=generator).double()
    expected = torch.full((20,), float(observed.mean()), dtype=torch.float64)
    reference = chisquare(observed.numpy(), expected.numpy()).pvalue
    assert p_value(observed, expected) == pytest.approx(reference, rel=1e-9)


def test_requests_draw_the_same_numbers_whatever_the_batch() -> None:
    """Sampled text does not depend on what else is in the batch, nor on the order."""
    target = make_target()
    drafter = make_drafter(target)
    verifier = SamplingVerifier(SamplingParams(1.0))
    requests = make_requests(target, count=4, prompt=5, new=60)
    alone = decode(make_engine(target, drafter, requests, 1, verifier=verifier), requests)
    together = decode(make_engine(target, drafter, requests, 3, verifier=verifier), requests[::-1])
    assert alone == together


def test_uniforms_are_uniform_and_differ() -> None:
    """Numbers of neighbouring positions and of other requests are unrelated."""
    draws = torch.stack(
        [RandomStream(0, f"r{r}").uniforms(p, 4) for r in range(50) for p in range(50)]
    )
    assert abs(float(draws.mean()) - 0.5) < 0.01
    correlation = torch.corrcoef(torch.stack((draws[:-1, 0], draws[1:, 0])))[0, 1]
    assert abs(float(correlation)) < 0.06  # three standard errors at 2500 pairs
