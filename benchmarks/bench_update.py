"""What an update of a draft costs, part by part, in plain decoding steps of the target.

Usage: THP_MEM_ALLOC_ENABLE=1 python benchmarks/bench_update.py [--drafters eagle3 dflash pard]
           [--target models/SmolLM2-135M-Instruct] [--turns 5] [--context 512] [--anchors 64]
           [--path 4] [--words 12000] [--scope full] [--zero-stage 0] [--chunk-rows N]
           [--requests 1 ...] [--random qwen3-8b] [--device cpu] [--precision float32] [--captured]
           [--json FILE]

One micro-step of DeepSpeed on the newest anchors of one text, the publication into a serving draft,
what that costs the next draft, as its weights are laid out anew, and the scores of what was trained
and of what serves, which a guard asks for and ``in all`` leaves out. ``--requests`` share the anchors,
each with a text of its own. Drafts have random weights and the size of real ones, as what they say
does not matter here; with ``--random`` so has the target, nothing is read from disk, and all are as
large as those that are published. ``--captured`` makes loss and gradients by a CUDA graph, on a CPU by
what stands in for one: they have no parts then, and are in ``other``. A plain step is one row behind
the same context, with packed weights; a turn is some of them, then an update, so that a busy machine
hits both. Only work outside of the named parts is left in ``other``. On a GPU a part ends when the
device is done, so that the host never runs ahead from one part into the next. The variable is what the
command ``cosched`` sets: large tensors in huge pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cost_ratio import target_step
from transformers import AutoModelForCausalLM, Qwen3Config

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.engines.embedded import attention
from cosched.engines.embedded.packing import PackedLinear, pack
from cosched.engines.embedded.target import Target
from cosched.guard.scorer import AcceptanceScorer
from cosched.loop.publish import InPlacePublisher
from cosched.protocols import Drafter, LossSettings
from cosched.records import Decision, Layout, SignalBatch
from cosched.testing.captured import by_doing
from cosched.tinyworld.distill import crops_to_batch
from cosched.tinyworld.drafts import layer_of
from cosched.training.captured import Captured
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.frames import Frames
from cosched.training.micro_step import BatchLoss
from drafters.dflash import DFlashConfig, DFlashDrafter
from drafters.eagle3 import Eagle3Config, Eagle3Drafter
from drafters.pard import PardConfig, PardDrafter
from losses.divergence import ForwardKL

PLAIN_STEPS = 5  # of a turn
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED = {  # where they differ from the target's layer: Qwen3-8B-DFlash-b16 and PARD-Qwen3-0.6B
    "eagle3": {},
    "dflash": {"num_hidden_layers": 5, "block_size": 16, "feature_layers": [1, 9, 17, 25, 33]},
    "pard": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_hidden_layers": 28, "model_type": "qwen3",
    },
}  # fmt: skip


class Stopwatch:
    """Seconds by part; what a part spends in another one counts there only."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        started = self._now()
        self._inside.append(0.0)
        yield
        spent = self._now() - started
        self.seconds[name] += spent - self._inside.pop()
        if self._inside:
            self._inside[-1] += spent

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count every call of that object's method as that part."""
        inner = getattr(owner, method)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


def load_target(options: argparse.Namespace) -> Target:
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if options.random != "qwen3-8b":
        return Target.load(options.target, device, dtype)
    with device:  # 16 GB of random numbers are there at once
        model: Any = AutoModelForCausalLM.from_config(
            Qwen3Config(**QWEN3_8B), dtype=dtype, attn_implementation=attention.NAME
        )
    return Target(model)


def make_drafter(
    kind: str, target: Target, path: int, words: int, published: bool = False
) -> Drafter:
    layer: dict[str, Any] = {**layer_of(target), "rope_theta": 10000.0}
    real: dict[str, Any] = PUBLISHED[kind] if published else {}
    if kind == "eagle3":
        eagle3 = Eagle3Config(**layer, draft_vocab_size=words)
        return Eagle3Drafter.initialise(eagle3, target, path)
    if kind == "dflash":
        shape = {**layer, "num_hidden_layers": 3, "block_size": max(8, path + 1), **real}
        dflash = DFlashConfig(**shape, num_target_layers=target.num_layers, mask_token_id=1)
        return DFlashDrafter.initialise(dflash, target, path)
    shape = {**layer, "model_type": "llama", "num_hidden_layers": 3, **real}
    pard = PardConfig(**shape, tie_word_embeddings=True, pard_token=1, spd_type="pard")
    return PardDrafter.initialise(pard, target, path)


def clock(device: torch.device) -> Callable[[], float]:
    """The time once the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def update(
    drafter: Drafter, target: Target, requests: int, options: argparse.Namespace
) -> Callable[[], dict[str, float]]:
    """Take an update and publish it; returns the seconds of its parts."""
    network = drafter.network()
    assert network is not None
    copy = drafter.clone(torch.float32)
    loss = ForwardKL(LossSettings(kind="forward_kl", position_decay=0.85))
    numbers = {"chunk_rows": options.chunk_rows, "precision": options.precision}
    batch_loss = BatchLoss(copy, loss, target.head, "hidden", **numbers)
    trainable = list(copy.scopes()[options.scope].parameters)
    frames = Frames(options.context, options.anchors, requests, True, options.context)
    record = by_doing if target.device.type == "cpu" else None
    trainer = DeepSpeedTrainer(
        batch_loss, trainable, zero_stage=options.zero_stage, learning_rate=3e-4, max_grad_norm=1.0,
        frames=frames if options.captured else None,
        capture=partial(Captured, record=record, must=True),
    )  # fmt: skip
    publisher = InPlacePublisher.of_modules(network, target.model, target_check_every=0)
    apart = drafter.clone(torch.float32)  # the copy's time is that of an update
    scorer = AcceptanceScorer(apart, target.head, "hidden", target.dtype, **numbers)
    loaded = {name: weight.clone() for name, weight in trainer.weights().items()}
    pack(network, rounds=True)
    layers = [one for one in network.modules() if isinstance(one, PackedLinear)]
    generator = torch.Generator().manual_seed(0)
    shape = (requests, options.context + 1)
    ids_RT = torch.randint(5, target.vocab_size, shape, generator=generator).to(target.device)
    newest, share = options.context - options.path, max(1, options.anchors // requests)
    anchors_N = torch.arange(newest - share, newest, device=target.device) + 1
    with torch.no_grad():
        anchors_RN = anchors_N.expand(requests, -1)
        batch = known(crops_to_batch(target, drafter, ids_RT, anchors_RN, options.path))

    watch = Stopwatch(clock(target.device))
    if not options.captured:  # a watch waits for the device, which nothing may that is captured
        watch.watch(copy, "replay_states", "replay")
        watch.watch(copy, "project", "student head")
        watch.watch(batch_loss, "_prepare", "teacher")
        for method in ("logits", "lost_mass"):
            watch.watch(batch_loss._teacher, method, "teacher")
        watch.watch(loss, "measure", "loss")
        watch.watch(trainer._engine, "backward", "backward")
    watch.watch(trainer._engine, "step", "optimizer")

    def read_weights() -> None:
        for layer in layers:
            layer(torch.zeros(1, layer.in_features))  # there are none but on a CPU

    def turn() -> dict[str, float]:
        watch.seconds.clear()
        with watch.part("other"):
            trainer.update(batch, Decision(num_steps=1))
        with watch.part("publication"):
            publisher.publish(trainer.weights())
        with watch.part("re-packing"), torch.no_grad():
            read_weights()
        with watch.part("scores"):
            scorer.scores(batch, [trainer.weights(), loaded])
        return dict(watch.seconds)

    return turn


def known(batch: SignalBatch) -> SignalBatch:
    """With what the host knows of a batch that a replay buffer gives: neighbours have rows in common."""
    requests, anchors, path = shape = batch.weights_RNK.shape
    along_text = np.arange(anchors)[:, None] + np.arange(path)
    says = np.arange(requests)[:, None, None] * (anchors + path) + along_text
    of = batch.starts_R, batch.weights_RNK, batch.teacher_RNKX
    return replace(batch, layout=Layout((0,) * requests, np.ones(shape, np.float32), says, of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash", "pard"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--path", type=int, default=4)
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--scope", default="full")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--chunk-rows", type=int, default=None)
    parser.add_argument("--requests", type=int, nargs="+", default=[1])
    parser.add_argument("--random", choices=["qwen3-8b", "no"], default="no")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--captured", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    target = load_target(options)
    pack(target.model)
    with torch.no_grad():
        plain_step = target_step(target, options.context, 1)
    rows = options.anchors * options.path
    print(
        f"{rows} rows behind {options.context} tokens, {torch.get_num_threads()} threads, "
        f"medians of {options.turns} turns"
    )
    figures: dict[str, Figure] = {}
    for kind in options.drafters:
        for requests in options.requests:
            torch.manual_seed(0)
            published = options.random == "qwen3-8b"
            drafter = make_drafter(kind, target, options.path, options.words, published)
            network = drafter.network()
            assert network is not None
            network.to(target.device, target.dtype)
            turn = update(drafter.clone(target.dtype), target, requests, options)
            plain, parts = timed(turn, plain_step, clock(target.device), options.turns)
            show(kind, requests, plain, parts)
            what = f"{kind}, {requests}" + (", captured" if options.captured else "")
            for name, seconds in {"plain step": plain, **parts}.items():
                ms = [1e3 * one for one in seconds]
                figures[f"{what}: {name} ms"] = median_of(ms, "ms")
    write_figures(options.json, figures)


def timed(
    turn: Callable[[], dict[str, float]],
    plain_step: Callable[[], object],
    now: Callable[[], float],
    turns: int,
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of plain steps, and of every part of an update, by turn; the first one warms up."""
    plain: list[float] = []
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(turns + 1):
        started = now()
        with torch.no_grad():
            for _ in range(PLAIN_STEPS):
                plain_step()
        step = (now() - started) / PLAIN_STEPS
        spent = turn()
        if number:
            plain.append(step)
            whole = sum(spent.values()) - spent["scores"]  # a guard may ask for them or not
            for name, seconds in {**spent, "in all": whole}.items():
                parts[name].append(seconds)
    return plain, parts


def show(kind: str, requests: int, plain: list[float], parts: dict[str, list[float]]) -> None:
    ratios = {
        name: statistics.median(s / step for s, step in zip(seconds, plain, strict=True))
        for name, seconds in parts.items()
    }
    print(
        f"{kind}, {requests} requests: a plain step takes {statistics.median(plain) * 1e3:.1f} ms; "
        f"in plain steps:"
    )
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
