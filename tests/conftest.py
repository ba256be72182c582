"""A random target of three thin layers for exact statements; the tiny world for what is trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cosched.engines.embedded.target import Target
from drafters.eagle3 import Eagle3Config, Eagle3Drafter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TINYWORLD = Path(__file__).parent.parent / "tinyworld"


def make_target(
    vocab_size: int = 64, seed: int = 0, std: float = 0.25, dtype: torch.dtype = torch.float32
) -> Target:
    """A random Qwen3 whose next-token distributions are far from uniform and from one another."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    return Target(model.to(dtype))


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
