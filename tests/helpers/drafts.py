"""A random EAGLE-3 draft for the random target of the tests."""

from __future__ import annotations

import torch

from cosched.engines.embedded.target import Target
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
