"""Whether sampled text follows the target: chi-square tests against exact probabilities.

A vocabulary of 6 and three generated tokens make 216 texts, whose probabilities are computed
exactly. Seeds are fixed, so a test is deterministic; over seeds it would fail by chance with
probability ``FALSE_ALARM``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.verification import SamplingParams, probabilities
from cosched.engines.request import GenerationRequest
from cosched.testing.harness import decode, make_engine, make_target

if TYPE_CHECKING:
    from cosched.engines.embedded.target import Target, TargetRows
    from cosched.engines.embedded.verifiers import Verifier
    from cosched.loop.lengths import DraftLengths
    from cosched.loop.roles import RoundObserver
    from cosched.protocols import Drafter

FALSE_ALARM = 1e-3
VOCABULARY = 6
NUM_TOKENS = 3
PROMPT = (1, 3, 2, 5)


def sampling_target() -> Target:
    """A target of few words, none of which is rare."""
    return make_target(VOCABULARY, seed=2, std=0.12)


class OnePrompt(LiveRows):
    """Rows of requests that all have one prompt: it is computed once in each slot, where it stays.

    A request writes behind its prompt alone, so who comes next finds it there, to the bit.
    """

    def __init__(
        self, target: Target, max_batch: int, max_length: int, feature_layers: tuple[int, ...]
    ) -> None:
        super().__init__(target, max_batch, max_length, feature_layers)
        self._prompts: dict[int, TargetRows] = {}

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        if slot not in self._prompts:
            self._prompts[slot] = super().prefill(slot, request)
        return self._prompts[slot]


def exact_texts(target: Target, sampling: SamplingParams) -> Tensor:
    """Probability of every text of three tokens ``[V, V, V]``."""
    joint = torch.ones(())
    for length in range(NUM_TOKENS):
        prefixes = itertools.product(range(VOCABULARY), repeat=length)
        ids = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
        logits = target.model(input_ids=ids).logits[:, -1].float()
        rows = probabilities(logits, sampling).view(*[VOCABULARY] * (length + 1))
        joint = joint[..., None] * rows
    return joint


def p_values(
    target: Target,
    drafter: Drafter,
    verifier: Verifier,
    sampling: SamplingParams,
    observer: RoundObserver | None = None,
    num_draws: int = 2000,
    lengths: DraftLengths | None = None,
) -> list[float]:
    """Of the token at each position and of the joint text; small where the text is not the target's."""
    prompt = torch.tensor(PROMPT)
    requests = [GenerationRequest(f"s{i}", prompt, NUM_TOKENS) for i in range(num_draws)]
    engine = make_engine(
        target,
        drafter,
        requests,
        100,
        verifier=verifier,
        observer=observer,
        rows=OnePrompt,
        lengths=lengths,
    )
    counts = torch.zeros(VOCABULARY, VOCABULARY, VOCABULARY)
    for tokens in decode(engine, requests).values():
        counts[tuple(tokens)] += 1
    joint = exact_texts(target, sampling)
    tables = [(counts.sum(rest), joint.sum(rest)) for rest in ((1, 2), (0, 2), (0, 1))]
    tables.append((counts.flatten(), joint.flatten()))
    return [p_value(observed, expected * num_draws) for observed, expected in tables]


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square after pooling cells that expect fewer than five."""
    if float(observed[expected == 0].sum()):
        return 0.0
    observed, expected = observed.double(), expected.double()
    rare = expected < 5
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 5:
        observed[-2] += observed[-1]
        expected[-2] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    expected = expected * observed.sum() / expected.sum()
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor(float(len(expected) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
