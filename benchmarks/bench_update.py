"""What an update of a draft costs, part by part, in plain decoding steps of the target.

Usage: THP_MEM_ALLOC_ENABLE=1 python benchmarks/bench_update.py [--drafters eagle3 dflash pard]
           [--target models/SmolLM2-135M-Instruct] [--turns 5] [--context 512] [--anchors 64]
           [--path 4] [--words 12000] [--scope full] [--zero-stage 0] [--chunk-rows N]

One micro-step of DeepSpeed on the newest anchors of one text, the publication into a serving draft,
and what that costs the next draft: its weights are laid out anew. Drafts have random weights and
the size of real ones, as what they say does not matter here. A plain step is one row behind the same
context, with packed weights; a turn is some of them, then an update, so that a busy machine hits
both. Only work outside of the named parts is left in ``other``. The variable is what the command
``cosched`` sets: large tensors in huge pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from bench_cost_ratio import target_step

from cosched.engines.embedded.packing import PackedLinear, pack
from cosched.engines.embedded.target import Target
from cosched.loop.publish import InPlacePublisher
from cosched.protocols import Drafter, LossSettings
from cosched.records import Decision
from cosched.tinyworld.distill import crops_to_batch
from cosched.tinyworld.drafts import layer_of
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from drafters.dflash import DFlashConfig, DFlashDrafter
from drafters.eagle3 import Eagle3Config, Eagle3Drafter
from drafters.pard import PardConfig, PardDrafter
from losses.divergence import ForwardKL

PLAIN_STEPS = 5  # of a turn


class Stopwatch:
    """Seconds by part; what a part spends in another one counts there only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        started = time.perf_counter()
        self._inside.append(0.0)
        yield
        spent = time.perf_counter() - started
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


def make_drafter(kind: str, target: Target, path: int, words: int) -> Drafter:
    layer: dict[str, Any] = {**layer_of(target), "rope_theta": 10000.0}
    if kind == "eagle3":
        eagle3 = Eagle3Config(**layer, draft_vocab_size=words)
        return Eagle3Drafter.initialise(eagle3, target, path)
    if kind == "dflash":
        dflash = DFlashConfig(
            **layer,
            num_hidden_layers=3,
            num_target_layers=target.num_layers,
            block_size=8,
            mask_token_id=1,
        )
        return DFlashDrafter.initialise(dflash, target, path)
    pard = PardConfig(
        **layer,
        model_type="llama",
        num_hidden_layers=3,
        tie_word_embeddings=True,
        pard_token=1,
        spd_type="pard",
    )
    return PardDrafter.initialise(pard, target, path)


def update(
    drafter: Drafter, target: Target, options: argparse.Namespace
) -> Callable[[], dict[str, float]]:
    """Take an update and publish it; returns the seconds of its parts."""
    network = drafter.network()
    assert network is not None
    copy = drafter.clone(torch.float32)
    loss = ForwardKL(LossSettings(kind="forward_kl", position_decay=0.85))
    batch_loss = BatchLoss(copy, loss, target.head, "hidden", chunk_rows=options.chunk_rows)
    trainable = list(copy.scopes()[options.scope].parameters)
    trainer = DeepSpeedTrainer(
        batch_loss, trainable, zero_stage=options.zero_stage, learning_rate=3e-4, max_grad_norm=1.0
    )
    publisher = InPlacePublisher.of_modules(network, target.model, target_check_every=0)
    pack(network, rounds=True)
    layers = [one for one in network.modules() if isinstance(one, PackedLinear)]
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(5, target.vocab_size, (1, options.context + 1), generator=generator)
    newest = options.context - options.path
    anchors_1N = torch.arange(newest - options.anchors, newest)[None] + 1
    with torch.no_grad():
        batch = crops_to_batch(target, drafter, ids_1T, anchors_1N, options.path)

    watch = Stopwatch()
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
            layer(torch.zeros(1, layer.in_features))

    def turn() -> dict[str, float]:
        watch.seconds.clear()
        with watch.part("other"):
            trainer.update(batch, Decision(num_steps=1))
        with watch.part("publication"):
            publisher.publish(trainer.weights())
        with watch.part("re-packing"), torch.no_grad():
            read_weights()
        return dict(watch.seconds)

    return turn


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
    options = parser.parse_args()
    target = Target.load(options.target, torch.device("cpu"), torch.float32)
    pack(target.model)
    with torch.no_grad():
        plain_step = target_step(target, options.context, 1)
    rows = options.anchors * options.path
    print(
        f"{rows} rows behind {options.context} tokens, {torch.get_num_threads()} threads, "
        f"medians of {options.turns} turns"
    )
    for kind in options.drafters:
        torch.manual_seed(0)
        drafter = make_drafter(kind, target, options.path, options.words)
        turn = update(drafter, target, options)
        plain: list[float] = []
        parts: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(options.turns + 1):  # the first one warms up
            started = time.perf_counter()
            with torch.no_grad():
                for _ in range(PLAIN_STEPS):
                    plain_step()
            step = (time.perf_counter() - started) / PLAIN_STEPS
            spent = turn()
            if number:
                plain.append(step)
                for name, seconds in {**spent, "in all": sum(spent.values())}.items():
                    parts[name].append(seconds / step)
        print(
            f"{kind}: a plain step takes {statistics.median(plain) * 1e3:.1f} ms; in plain steps:"
        )
        print(
            ", ".join(f"{name} {statistics.median(ratios):.2f}" for name, ratios in parts.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
