"""A random target of three thin layers for exact statements; the tiny world for what is trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.testing.harness import make_target
from drafters.eagle3 import Eagle3Config, Eagle3Drafter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does
TINYWORLD = Path(__file__).parent.parent / "tinyworld"


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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors run faster on one thread, and a busy second core does not slow them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target() -> Target:
    return make_target()


@pytest.fixture(scope="session")
def tinyworld() -> Path:
    return TINYWORLD


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    return Target.load(str(TINYWORLD / "target"), torch.device("cpu"), torch.float32)
