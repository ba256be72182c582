"""One micro-update through DeepSpeed against the same step in plain PyTorch AdamW.

Usage: python benchmarks/bench_micro_step.py [--anchors 176] [--pairs 30] [--threads 2] [--json FILE]

Same batch, same draft, embedding and head frozen (scope ``body``), clipping and AdamW in both.
The steps are interleaved in one process, so that a busy machine hits all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.build.embedded import build_world, load_drafter
from cosched.protocols import LossSettings
from cosched.records import SignalBatch
from cosched.settings.load import load_config
from cosched.tinyworld.distill import crops_to_batch
from cosched.training.deepspeed_trainer import BETAS, DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from losses.divergence import ForwardKL

ROOT = Path(__file__).parent.parent


def plain_step(batch_loss: BatchLoss, trainable: set[str]) -> Callable[[SignalBatch], float]:
    network = batch_loss.network
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trainable)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=BETAS, weight_decay=0.0)

    def step(batch: SignalBatch) -> float:
        loss = batch_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anchors", type=int, default=176)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["workload.max_prompts=1"])
    world = build_world(config)
    torch.set_num_threads(options.threads)
    drafter = load_drafter(world)
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(2, world.target.vocab_size, (1, options.context), generator=generator)
    anchors = 1 + torch.randperm(options.context - 5, generator=generator)[: options.anchors]
    device = world.target.device
    batch = crops_to_batch(world.target, drafter, ids_1T.to(device), anchors[None].to(device), 3)

    def loss_of_copy() -> tuple[BatchLoss, list[str]]:
        copy = drafter.clone(torch.float32)
        loss = ForwardKL(LossSettings(kind="forward_kl"))
        return BatchLoss(copy, loss, world.target.head, "hidden"), list(
            copy.scopes()["body"].parameters
        )

    steps: dict[str, Callable[[SignalBatch], object]] = {}
    batch_loss, names = loss_of_copy()
    steps["plain AdamW"] = plain_step(batch_loss, set(names))
    for stage in (0, 1, 2):
        batch_loss, names = loss_of_copy()
        steps[f"DeepSpeed ZeRO {stage}"] = DeepSpeedTrainer(
            batch_loss, names, stage, learning_rate=3e-4, max_grad_norm=1.0
        ).step
    for step in steps.values():
        step(batch)
        step(batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.pairs):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    plain = times["plain AdamW"]
    print(f"{batch.num_rows} rows, {options.threads} threads, {options.pairs} pairs")
    figures: dict[str, Figure] = {}
    for name, seconds in times.items():
        ms = median_of([1e3 * one for one in seconds], "ms")
        ratio = median_of([s / p for s, p in zip(seconds, plain, strict=True)], "times")
        print(f"{name:<18} {ms.value:8.2f} ms  ratio {ratio.value:5.3f}")
        figures |= {f"{name} ms": ms, f"{name} / plain": ratio}
    print("aim: DeepSpeed ZeRO 1 at most 1.25 of plain AdamW")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
