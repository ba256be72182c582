"""What the shared interface costs: ``propose`` and ``replay`` against loops written by hand.

Usage: python benchmarks/bench_drafters.py [--pairs 200] [--threads 1] [--device cuda] [--json FILE]

Every family of the tiny world, over the very same module. The hand-written serving loop knows that
all slots have the same length, keeps its own cache, masks only what it must and has no window. The
hand-written training step is how the family is trained offline: all anchors in one sequence under
one dense mask (DFlash, PARD), or every row unrolled under a causal mask and diagonals (EAGLE-3).
Both sides of a pair run in turns, so that a busy machine hits both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.engines.embedded.target import Target
from cosched.protocols import Drafter
from cosched.records import Segment, SignalBatch
from cosched.tinyworld.distill import crops_to_batch
from cosched.tinyworld.drafts import DRAFTS, NUM_DRAFT_TOKENS
from drafters.dflash import DFlashDrafter
from drafters.eagle3 import Eagle3Drafter
from drafters.layers import DecoderLayer
from drafters.pard import PardDrafter

ROOT = Path(__file__).parent.parent
START, NEW = 512, 2  # tokens before the first round, tokens committed by each
K = NUM_DRAFT_TOKENS
Propose = Callable[[Tensor, Tensor], Tensor]
"""``propose(tokens_BN1, features_BNF) -> tokens_BK``: N rows were committed to every slot."""
Compared = tuple[Figure, ...]
"""Milliseconds of the shared interface, of the loop by hand, and the ratio of a pair."""


class Cache:
    """Keys and values of one layer for slots of equal length."""

    def __init__(self, layer: DecoderLayer, batch: int, length: int) -> None:
        heads, width = layer.self_attn.kv_heads, layer.self_attn.head_dim
        self.keys = torch.zeros(batch, heads, length, width)
        self.values = torch.zeros(batch, heads, length, width)

    def put(self, start: int, keys_BTHD: Tensor, values_BTHD: Tensor) -> None:
        end = start + keys_BTHD.shape[1]
        self.keys[:, :, start:end] = keys_BTHD.transpose(1, 2)
        self.values[:, :, start:end] = values_BTHD.transpose(1, 2)

    def attend(self, queries_BTJD: Tensor, end: int, mask: Tensor | None = None) -> Tensor:
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        attended = F.scaled_dot_product_attention(
            queries_BTJD.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
        )
        return attended.transpose(1, 2)


def eagle3_loop(drafter: Eagle3Drafter, target: Target, batch: int, length: int) -> Propose:
    network = drafter.network()
    cache, at = Cache(network.midlayer, batch, length), 0
    network.rotary.reserve(length)

    def propose(tokens_BN1: Tensor, features_BNF: Tensor) -> Tensor:
        nonlocal at
        tokens = tokens_BN1[:, 1:]
        positions = at + torch.arange(tokens.shape[1])
        inputs, residual = network.inputs(target.embedding(tokens), network.fuse(features_BNF))
        cache.put(at, *network.keys_values(inputs, positions))
        at += tokens.shape[1]
        inputs, residual = inputs[:, -1:], residual[:, -1:]
        queries = network.queries(inputs, positions[-1:])
        drafted: list[Tensor] = []
        hidden = residual
        for k in range(K):
            if k:
                inputs, residual = network.inputs(target.embedding(drafted[-1]), hidden)
                queries, keys, values = network.project(inputs, positions[-1:] + k)
                cache.put(at + k - 1, keys, values)
            finished = network.finish(residual, cache.attend(queries, at + k))
            normed, hidden = network.outputs(finished)
            assert network.lm_head is not None
            drafted.append(network.lm_head(normed).float().argmax(-1))
        return torch.cat(drafted, 1)

    return propose


def dflash_loop(drafter: DFlashDrafter, target: Target, batch: int, length: int) -> Propose:
    network = drafter.network()
    caches, at = [Cache(layer, batch, length) for layer in network.layers], 0
    network.rotary.reserve(length)

    def propose(tokens_BN1: Tensor, features_BNF: Tensor) -> Tensor:
        nonlocal at
        context = network.context(features_BNF)
        positions = at + torch.arange(context.shape[1])
        at += context.shape[1]
        block = torch.full((batch, K + 1), 1)
        block[:, 0] = tokens_BN1[:, -1]
        hidden = target.embedding(block)
        own = at + torch.arange(K + 1)
        for layer, cache in zip(network.layers, caches, strict=True):
            cache.put(
                at - len(positions),
                *layer.self_attn.keys_values(context, network.rotary, positions),
            )
            queries, keys, values = layer.self_attn.project(
                layer.input_layernorm(hidden), network.rotary, own
            )
            cache.put(at, keys, values)
            hidden = layer.finish(hidden, cache.attend(queries, at + K + 1))
        return target.head(network.norm(hidden[:, 1:])).float().argmax(-1)

    return propose


def pard_loop(drafter: PardDrafter, target: Target, batch: int, length: int) -> Propose:
    del target
    network = drafter.network()
    layers = network.model.layers
    caches, at = [Cache(layer, batch, length) for layer in layers], 0
    network.rotary.reserve(length)

    def propose(tokens_BN1: Tensor, features_BNF: Tensor) -> Tensor:
        nonlocal at
        del features_BNF
        tokens = tokens_BN1 if at == 0 else tokens_BN1[:, 1:]
        ids = torch.cat((tokens, tokens.new_full((batch, K - 1), 1)), 1)
        end = at + ids.shape[1]
        positions = torch.arange(at, end)
        mask = torch.arange(end) <= positions[:, None]
        hidden = network.embed(ids, None)
        for layer, cache in zip(layers, caches, strict=True):
            queries, keys, values = layer.self_attn.project(
                layer.input_layernorm(hidden), network.rotary, positions
            )
            cache.put(at, keys, values)
            hidden = layer.finish(hidden, cache.attend(queries, end, mask))
        at += tokens.shape[1]
        return network.head(hidden[:, -K:]).float().argmax(-1)

    return propose


def shared(drafter: Drafter, target: Target, batch: int, length: int) -> Propose:
    """The same through new_state, observe and propose."""
    del target
    state = drafter.new_state(batch, length, None)

    def propose(tokens_BN1: Tensor, features_BNF: Tensor) -> Tensor:
        for slot in range(batch):
            segment = Segment("bench", 0, tokens_BN1[slot], features_BNF[slot], None)
            drafter.observe(state, slot, segment)
        return drafter.propose(state, batch, lambda _k, logits: logits.argmax(-1), K).tokens_BK

    return propose


def plain_eagle3(drafter: Eagle3Drafter, target: Target, batch: SignalBatch) -> Tensor:
    """Training-time test as EAGLE-3 is trained: every row of the crop, one diagonal a step."""
    network = drafter.network()
    assert batch.features_RCF is not None
    length = batch.features_RCF.shape[1]
    positions = torch.arange(length)
    tokens = F.pad(batch.tokens_RC1[:, 1:], (0, K))
    hidden = network.fuse(batch.features_RCF)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = []
    scale = network.midlayer.self_attn.head_dim**-0.5
    for step in range(K):
        embedded = target.embedding(tokens[:, step : step + length]).detach()
        inputs, residual = network.inputs(embedded, hidden)
        q, k, v = (x.transpose(1, 2) for x in network.project(inputs, positions + step))
        groups = q.shape[1] // k.shape[1]
        keys.append(k.repeat_interleave(groups, 1))
        values.append(v.repeat_interleave(groups, 1))
        scores = (q @ keys[0].transpose(-1, -2) * scale).masked_fill(~causal, float("-inf"))
        own = [(q * one).sum(-1, keepdim=True) * scale for one in keys[1:]]
        weights = torch.cat([scores, *own], -1).softmax(-1)
        attended = weights[..., :length] @ values[0]
        for i, one in enumerate(values[1:]):
            attended = attended + weights[..., length + i : length + i + 1] * one
        normed, hidden = network.outputs(network.finish(residual, attended.transpose(1, 2)))
        assert network.lm_head is not None
        logits.append(network.lm_head(normed))
    rows = torch.stack(logits, 2)
    index = (batch.anchors_RN - 1)[..., None, None].expand(-1, -1, K, rows.shape[-1])
    return rows.gather(1, index)


def plain_dflash(drafter: DFlashDrafter, target: Target, batch: SignalBatch) -> Tensor:
    """Packed blocks under one dense mask, as DFlash is trained."""
    network = drafter.network()
    assert batch.features_RCF is not None
    length = batch.features_RCF.shape[1]
    num_anchors = batch.anchors_RN.shape[1]
    at_C, at_S = torch.arange(length), torch.arange(K + 1)
    context = network.context(batch.features_RCF)
    block = batch.tokens_RC1.new_full((*batch.anchors_RN.shape, K + 1), 1)
    block[..., 0] = batch.tokens_RC1.gather(1, batch.anchors_RN)
    hidden = target.embedding(block.flatten(1)).detach()
    own = (batch.anchors_RN[..., None] + at_S).flatten(1)
    owner = torch.arange(num_anchors).repeat_interleave(K + 1)
    anchor_of_row = batch.anchors_RN.repeat_interleave(K + 1, 1)
    mask = torch.cat(
        (
            at_C < anchor_of_row[..., None],
            (owner == owner[:, None]).expand(len(anchor_of_row), -1, -1),
        ),
        -1,
    )[:, None]
    for layer in network.layers:
        keys_C, values_C = layer.self_attn.keys_values(context, network.rotary, at_C)
        q, k, v = layer.self_attn.project(layer.input_layernorm(hidden), network.rotary, own)
        keys, values = torch.cat((keys_C, k), 1), torch.cat((values_C, v), 1)
        hidden = layer.finish(hidden, dense(q, keys, values, mask))
    return target.head(network.norm(hidden.unflatten(1, (num_anchors, K + 1))[:, :, 1:]))


def plain_pard(drafter: PardDrafter, target: Target, batch: SignalBatch) -> Tensor:
    """Text and packed masks in one sequence under one dense mask, as PARD is trained."""
    del target
    network = drafter.network()
    length = batch.tokens_RC1.shape[1]
    num_anchors = batch.anchors_RN.shape[1]
    at_C, ahead = torch.arange(length), torch.arange(1, K)
    ids = F.pad(batch.tokens_RC1, (0, num_anchors * (K - 1)), value=1)
    own = (batch.anchors_RN[..., None] + ahead).flatten(1)
    positions = torch.cat((at_C.expand(len(own), -1), own), 1)
    owner = torch.arange(num_anchors).repeat_interleave(K - 1)
    chain = (owner == owner[:, None]) & (
        ahead.repeat(num_anchors) <= ahead.repeat(num_anchors)[:, None]
    )
    anchor_of_row = batch.anchors_RN.repeat_interleave(K - 1, 1)
    upper = F.pad((at_C <= at_C[:, None]).expand(len(own), -1, -1), (0, own.shape[1]))
    lower = torch.cat((at_C <= anchor_of_row[..., None], chain.expand(len(own), -1, -1)), -1)
    mask = torch.cat((upper, lower), 1)[:, None]
    hidden = network.embed(ids, None)
    for layer in network.model.layers:
        q, k, v = layer.self_attn.project(layer.input_layernorm(hidden), network.rotary, positions)
        hidden = layer.finish(hidden, dense(q, k, v, mask))
    masked = hidden[:, length:].unflatten(1, (num_anchors, K - 1))
    index = batch.anchors_RN[..., None].expand(-1, -1, hidden.shape[-1])
    return network.head(torch.cat((hidden.gather(1, index)[:, :, None], masked), 2))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


LOOPS = {"eagle3": eagle3_loop, "dflash": dflash_loop, "pard": pard_loop}
PLAIN = {"eagle3": plain_eagle3, "dflash": plain_dflash, "pard": plain_pard}


@torch.no_grad()
def time_propose(name: str, target: Target, batch: int, pairs: int) -> Compared:
    drafter = DRAFTS[name](target)
    drafter.network().requires_grad_(False)
    length = START + NEW * (pairs + 5) + 2 * K + 4
    sides = [shared(drafter, target, batch, length), LOOPS[name](drafter, target, batch, length)]
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    width = max(1, len(drafter.signal.feature_layers)) * target.hidden_size
    times: list[list[float]] = [[], []]
    last = torch.randint(2, target.vocab_size, (batch, 1), generator=generator)
    for turn in range(pairs + 5):
        rows = NEW if turn else START
        new = torch.randint(2, target.vocab_size, (batch, rows), generator=generator)
        tokens, last = torch.cat((last, new), 1), new[:, -1:]
        features = torch.randn(batch, rows, width, generator=generator)
        found = []
        for side in (0, 1) if turn % 2 else (1, 0):
            started = now()
            found.append(sides[side](tokens, features))
            if turn >= 5:
                times[side].append(now() - started)
        assert torch.equal(*found), f"{name}: the two sides draft different tokens"
    return compare(*times)


def time_replay(name: str, target: Target, batch: int, pairs: int) -> Compared:
    drafter = DRAFTS[name](target)
    drafter.network().rotary.reserve(257 + K)
    parameters = list(drafter.network().parameters())
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(2, target.vocab_size, (batch, 257), generator=generator)
    # An EAGLE-3 step trains every row of a crop; the others draw anchors.
    count = 252 if name == "eagle3" else 64
    anchors = torch.stack(
        [1 + torch.randperm(252, generator=generator)[:count].sort().values for _ in range(batch)]
    )
    rows = crops_to_batch(target, drafter, ids, anchors, K)
    labels = rows.paths_RNK.flatten()

    def step(logits: Callable[[], Tensor]) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        found = logits()
        F.cross_entropy(found.flatten(0, 2), labels).backward()
        return found.detach()

    sides = [lambda: drafter.replay(rows), lambda: PLAIN[name](drafter, target, rows)]
    times: list[list[float]] = [[], []]
    for turn in range(pairs + 2):
        found = []
        for side in (0, 1) if turn % 2 else (1, 0):
            started = now()
            found.append(step(sides[side]))
            if turn >= 2:
                times[side].append(now() - started)
        # The text is the path, so both compute the same; float32 sums in another order.
        assert torch.allclose(*found, atol=1e-3), f"{name}: the two sides compute different logits"
    return compare(*times)


def now() -> float:
    """The time once the device has done what it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(ours: list[float], theirs: list[float]) -> Compared:
    ratio = median_of([a / b for a, b in zip(ours, theirs, strict=True)], "times")
    return *(median_of([1e3 * one for one in side], "ms") for side in (ours, theirs)), ratio


def show(what: str, times: Compared) -> None:
    shared_ms, by_hand_ms, ratio = (one.value for one in times)
    print(f"{what}{shared_ms:>8.2f}ms{by_hand_ms:>8.2f}ms{ratio:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--families", nargs="+", default=list(LOOPS))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)  # of everything that the loops make
    device = torch.device(options.device)
    target = Target.load(str(ROOT / "tinyworld/target"), device, torch.float32)
    print(f"{'':<8}{'':<22}{'shared':>10}{'by hand':>10}{'ratio':>8}")
    figures: dict[str, Figure] = {}
    for name in options.families:
        for batch in (1, 8):
            times = time_propose(name, target, batch, options.pairs)
            show(f"{name:<8}propose, batch {batch:<7}", times)
            figures[f"{name} propose, batch {batch}, / by hand"] = times[-1]
        for batch in (1, 8):
            times = time_replay(name, target, batch, max(4, options.pairs // 10))
            show(f"{name:<8}replay, requests {batch:<5}", times)
            figures[f"{name} replay, requests {batch}, / by hand"] = times[-1]
    print("aim: at most 1.15 each")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
