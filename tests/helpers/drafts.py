"""Drafts for the random target of the tests: a random EAGLE-3, and one without distributions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from cosched.engines.embedded.target import Target
from cosched.protocols import Choose, Drafter
from cosched.records import Proposal, Segment, SignalSpec
from drafters.eagle3 import Eagle3Config, Eagle3Drafter


def make_drafter(target: Target, num_draft_tokens: int = 3, seed: int = 1) -> Eagle3Drafter:
    """A random EAGLE-3 head for that target."""
    torch.manual_seed(seed)
    config = Eagle3Config(
        hidden_size=target.hidden_size,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        feature_layers=[0, 1, 2],
    )
    drafter = Eagle3Drafter.initialise(config, target, num_draft_tokens)
    drafter.network().to(target.device, target.dtype).requires_grad_(False)
    return drafter


class Lookup(Drafter):
    """Drafts what followed a token when it last stood in the text: tokens, and no distribution."""

    draft_type = "none"
    cache_bytes_per_token = 0

    def __init__(self, vocab_size: int, num_draft_tokens: int = 3) -> None:
        self.vocab_size = vocab_size
        self.num_draft_tokens = num_draft_tokens
        self.signal = SignalSpec((), "none")

    def new_state(
        self, max_batch: int, max_length: int, window: int | None
    ) -> list[tuple[dict[int, int], list[int]]]:
        return [({}, []) for _ in range(max_batch)]

    def observe(self, state, slot: int, segment: Segment) -> None:
        tokens = segment.tokens_R1.tolist()
        following, text = state[slot]
        following.update(pairwise(tokens))
        text[:] = tokens[-1:]

    def propose(self, state, num_slots: int, choose: Choose, num_draft_tokens: int) -> Proposal:
        rows = []
        for following, text in state[:num_slots]:
            token, row = text[0], []
            for _ in range(num_draft_tokens):
                token = following.get(token, (token + 1) % self.vocab_size)
                row.append(token)
            rows.append(row)
        return Proposal(torch.tensor(rows))

    def move_slot(self, state, source: int, destination: int) -> None:
        state[destination] = state[source]
        state[source] = ({}, [])

    def not_for_sglang(self) -> list[str]:
        return ["it has no network"]

    def save(self, directory: Path) -> None:
        raise NotImplementedError
