"""Adaptation never changes what the target would have said."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from scipy.stats import chisquare

from cosched.engines.embedded.judges import SamplingJudge
from cosched.engines.embedded.request import GenerationRequest
from cosched.engines.embedded.verification import (
    Outcome,
    RandomStream,
    SamplingParams,
    draw,
    probabilities,
)
from tests.conftest import make_drafter, make_target
from tests.helpers import decode, make_coscheduler, make_engine, make_requests

if TYPE_CHECKING:
    from cosched.engines.embedded.target import Target
    from cosched.records import Proposal


@pytest.fixture(scope="module")
def plain(target: Target) -> dict[str, list[int]]:
    """Plain decoding of four prompts, 512 tokens each."""
    requests = make_requests(target, count=4, prompt=7, new=512)
    return decode(make_engine(target, None, requests), requests)


ARMS = ("frozen", "frozen+window", "adapted", "adapted+window")
FAST = {("adapted", 4), ("frozen+window", 4)}


@pytest.mark.parametrize(
    ("arm", "max_batch"),
    [
        pytest.param(arm, size, marks=() if (arm, size) in FAST else pytest.mark.slow)
        for arm in ARMS
        for size in (1, 3, 4)
    ],
)
def test_greedy_equals_plain(
    target: Target, plain: dict[str, list[int]], arm: str, max_batch: int
) -> None:
    """Greedy text of every arm is plain decoding's, token for token, across publications."""
    requests = make_requests(target, count=4, prompt=7, new=512)
    drafter = make_drafter(target)
    window = 24 if arm.endswith("+window") else None
    observer = None
    if arm.startswith("adapted"):
        observer = make_coscheduler(target, drafter, every=10, lr=3e-3, window=window)
    engine = make_engine(target, drafter, requests, max_batch, observer=observer, window=window)
    assert decode(engine, requests) == plain
    if observer is not None:
        assert observer.version >= 20
        assert observer.totals.accepted > 100  # else nothing but refusals was tested


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 4])
def test_greedy_equals_plain_on_the_tiny_world(tiny_target: Target, tinyworld, max_batch) -> None:
    """The same on trained models, where drafts are accepted often."""
    from transformers import AutoTokenizer

    from cosched.protocols import DrafterSettings
    from cosched.workload import read_texts
    from drafters.eagle3 import Eagle3Drafter

    tokenizer = AutoTokenizer.from_pretrained(tinyworld / "target")
    texts = read_texts(tinyworld / "prompts" / "translated.jsonl", "prompts")[:4]
    requests = [
        GenerationRequest(name, torch.tensor(tokenizer(text)["input_ids"]), 512)
        for name, text in texts
    ]
    plain = decode(make_engine(tiny_target, None, requests, max_batch), requests)
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


# --- sampling: chi-square against exact probabilities --------------------------------------
#
# Vocabulary 6, three generated tokens: 216 texts whose probabilities are computed exactly. The
# seeds are fixed, so the tests are deterministic; over seeds each would fail by chance with
# probability FALSE_ALARM.

FALSE_ALARM = 1e-3
VOCABULARY = 6
NUM_DRAWS = 2000


class AcceptAll(SamplingJudge):
    """A broken judge: every draft stands."""

    def rule(self, proposal: Proposal, logits_BSV, uniforms_BU, path_BS) -> Outcome:
        last = probabilities(logits_BSV[:, -1], self.sampling)
        count = torch.full((len(last),), proposal.tokens_BK.shape[1])
        return Outcome(count, draw(last, uniforms_BU[:, -1]))


class Scrambler:
    """An observer that replaces the draft's head after every round: the hardest publication."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.generator = torch.Generator().manual_seed(5)

    def on_round(self, _round: object) -> None:
        weight = self.network.lm_head.weight
        weight.data.copy_(torch.randn(weight.shape, generator=self.generator) * 0.3)


def exact_texts(target: Target, prompt: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probability of every text of three tokens ``[V, V, V]``."""
    joint = torch.ones(())
    for length in range(3):
        prefixes = list(itertools.product(range(VOCABULARY), repeat=length))
        ids = torch.stack(
            [torch.cat((prompt, torch.tensor(p, dtype=torch.int64))) for p in prefixes]
        )
        logits = target.model(input_ids=ids).logits[:, -1].float()
        rows = probabilities(logits, sampling).view(*[VOCABULARY] * (length + 1))
        joint = joint[..., None] * rows
    return joint


def p_values(
    judge_of, observer_of, sampling: SamplingParams, num_draws: int = NUM_DRAWS
) -> list[float]:
    """Of the joint text and of the token at each position."""
    target = make_target(VOCABULARY, seed=2, std=0.12)
    drafter = make_drafter(target, num_draft_tokens=2)
    prompt = torch.tensor([1, 3, 2, 5])
    requests = [GenerationRequest(f"s{i}", prompt, 3) for i in range(num_draws)]
    engine = make_engine(
        target,
        drafter,
        requests,
        max_batch=100,
        judge=judge_of(sampling),
        observer=observer_of(target, drafter),
    )
    counts = torch.zeros(VOCABULARY, VOCABULARY, VOCABULARY)
    for tokens in decode(engine, requests).values():
        counts[tuple(tokens)] += 1
    joint = exact_texts(target, prompt, sampling)
    tables = [(counts.sum((1, 2)), joint.sum((1, 2)))]
    tables += [(counts.sum((0, 2)), joint.sum((0, 2))), (counts.sum((0, 1)), joint.sum((0, 1)))]
    tables.append((counts.flatten(), joint.flatten()))
    return [_p_value(observed, expected * num_draws) for observed, expected in tables]


def _p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square after pooling cells that expect fewer than five."""
    rare = expected < 5
    if float(observed[expected == 0].sum()):
        return 0.0
    observed, expected = observed.double(), expected.double()
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 5:
        observed[-2] += observed[-1]
        expected[-2] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    expected = expected * observed.sum() / expected.sum()
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


PLAIN, CUT = SamplingParams(1.0), SamplingParams(0.7, top_p=0.8)


@pytest.mark.parametrize(
    ("sampling", "updates"),
    [
        (PLAIN, "trained"),
        pytest.param(CUT, "trained", marks=pytest.mark.slow),
        pytest.param(PLAIN, "none", marks=pytest.mark.slow),
        pytest.param(CUT, "none", marks=pytest.mark.slow),
        pytest.param(PLAIN, "scrambled", marks=pytest.mark.slow),
        pytest.param(CUT, "scrambled", marks=pytest.mark.slow),
    ],
)
def test_sampling_follows_the_target(sampling: SamplingParams, updates: str) -> None:
    """Sampled text has the target's exact distribution, also while the draft keeps changing."""

    def observer_of(target: Target, drafter):
        if updates == "trained":
            return make_coscheduler(target, drafter, every=2, lr=3e-3)
        return Scrambler(drafter.network()) if updates == "scrambled" else None

    assert min(p_values(SamplingJudge, observer_of, sampling)) > FALSE_ALARM


def test_the_chi_square_test_can_fail() -> None:
    """A judge that accepts every draft is caught at once."""
    found = p_values(AcceptAll, lambda _t, _d: None, SamplingParams(1.0), num_draws=600)
    assert min(found) < 1e-12


def test_requests_draw_the_same_numbers_whatever_the_batch() -> None:
    """Sampled text does not depend on what else is in the batch, nor on the order."""
    target = make_target()
    drafter = make_drafter(target)
    judge = SamplingJudge(SamplingParams(1.0))
    requests = make_requests(target, count=4, prompt=5, new=60)
    alone = decode(make_engine(target, drafter, requests, 1, judge=judge), requests)
    together = decode(make_engine(target, drafter, requests, 3, judge=judge), requests[::-1])
    assert alone == together


def test_uniforms_are_uniform_and_differ() -> None:
    """Numbers of neighbouring positions and of other requests are unrelated."""
    draws = torch.stack(
        [RandomStream(0, f"r{r}").uniforms(p, 4) for r in range(50) for p in range(50)]
    )
    assert abs(float(draws.mean()) - 0.5) < 0.01
    correlation = torch.corrcoef(torch.stack((draws[:-1, 0], draws[1:, 0])))[0, 1]
    assert abs(float(correlation)) < 0.06  # three standard errors at 2500 pairs
