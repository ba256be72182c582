"""The target: a deep and narrow Qwen3, so that verifying costs what it costs in production.

Half the layers are trained on short crops first; then each layer is followed by a copy of itself
whose output projections are zero (the function is unchanged) and the whole is trained on longer
crops. This halves the time to a given loss on a CPU.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from cosched.tinyworld.optimize import (
    Optimizers,
    make_optimizers,
    rate_share,
    take_step,
)
from cosched.tinyworld.tokens import VOCAB_SIZE, TokenStore, load_tokens
from cosched.training.precision import computing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MIX: Mapping[str, float] = {"code": 0.42, "manuals": 0.40, "translated": 0.18}
LEARNING_RATE = 4e-3
WARMUP_STEPS = 40
DECAY_SHARE = 0.5  # the last half of all tokens is trained with a falling rate


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training at one depth and crop length."""

    num_layers: int
    length: int
    batch: int
    tokens: int
    attention: str


STAGES = (
    Stage(num_layers=8, length=256, batch=32, tokens=5_500_000, attention="eager"),
    Stage(num_layers=16, length=512, batch=16, tokens=1_600_000, attention="eager"),
    Stage(num_layers=16, length=2048, batch=4, tokens=700_000, attention="sdpa"),
    Stage(num_layers=16, length=4096, batch=2, tokens=160_000, attention="sdpa"),
)


def target_config(num_layers: int) -> Qwen3Config:
    """24 MiB must hold the target and three drafts, and head counts must split over two ranks."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def grow(model: Qwen3ForCausalLM, num_layers: int) -> Qwen3ForCausalLM:
    """The same function with twice the layers: every layer gains a silent copy behind it."""
    grown = Qwen3ForCausalLM(target_config(num_layers))
    grown.load_state_dict(model.state_dict(), strict=False)
    layers: Any = grown.model.layers
    for index, layer in enumerate(layers):
        layer.load_state_dict(copy.deepcopy(model.model.layers[index // 2].state_dict()))
        if index % 2:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def mixed_batch(
    stores: Mapping[str, TokenStore], count: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Crops drawn over the domains in the proportions of ``MIX``, int64 ``[count, length]``."""
    weights = torch.tensor([MIX[domain] for domain in stores])
    choice = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    domains = list(stores)
    return torch.cat([stores[domains[c]].crops(1, length, generator) for c in choice])


def pretrain(
    tokens_dir: Path,
    seed: int,
    advance: Callable[[int, str], None],
    stages: tuple[Stage, ...] = STAGES,
) -> Qwen3ForCausalLM:
    """Train the target from scratch; ``advance(tokens, message)`` is called after every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stores = {domain: load_tokens(tokens_dir, domain, "train") for domain in MIX}
    total = sum(stage.tokens for stage in stages)
    done = 0
    model = Qwen3ForCausalLM(target_config(stages[0].num_layers))
    for stage in stages:
        if model.config.num_hidden_layers != stage.num_layers:
            model = grow(model, stage.num_layers)
        model.set_attn_implementation(stage.attention)
        model.train()
        optimizers = make_optimizers(model, weight_decay=0.05)
        step_tokens = stage.batch * stage.length
        for step in range(stage.tokens // step_tokens):
            rate = LEARNING_RATE * rate_share(step, done / total, WARMUP_STEPS, DECAY_SHARE)
            started = time.perf_counter()
            loss = _step(
                model, mixed_batch(stores, stage.batch, stage.length, generator), optimizers, rate
            )
            done += step_tokens
            speed = step_tokens / (time.perf_counter() - started)
            advance(step_tokens, f"loss {loss:.3f} at length {stage.length}, {speed:.0f} tokens/s")
    model.set_attn_implementation("sdpa")
    return model.eval()


def _step(
    model: Qwen3ForCausalLM,
    ids_BT: torch.Tensor,
    optimizers: Optimizers,
    rate: float,
) -> float:
    with computing_in("auto", torch.device("cpu")):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    take_step(loss, model.parameters(), optimizers, rate)
    return loss.item()


@torch.no_grad()
def loss_by_position(
    model: Qwen3ForCausalLM, store: TokenStore, edges: tuple[int, ...], num_crops: int
) -> list[float]:
    """Held-out cross-entropy in nats per token between consecutive ``edges`` of the position."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = store.crops(num_crops, edges[-1] + 1, generator)
    losses = []
    for ids_T in ids_BT:
        logits_TV = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits_TV, ids_T[1:], reduction="none"))
    mean_T = torch.stack(losses).mean(0)
    return [mean_T[a:b].mean().item() for a, b in itertools.pairwise(edges)]
