"""What each scope costs: a micro-step, a publication, and a proposal for a batch.

Usage: python benchmarks/bench_scopes.py [--family eagle3] [--pairs 30] [--threads 1] [--batch 4] [--json FILE]

Micro-steps and publications of all scopes are interleaved in one process, and so are proposals of
the plain draft and of one with adapters beside one another, so that a busy machine hits all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cosched.bench.figures import Figure, median_of, write_figures
from cosched.build.embedded import build_world, load_drafter
from cosched.build.trainer import build_trainer
from cosched.loop.publish import InPlacePublisher
from cosched.records import Decision
from cosched.settings.load import load_config
from cosched.testing.specimen import Feeder, make_texts
from cosched.tinyworld.distill import crops_to_batch
from cosched.training.lora import find_layers

ROOT = Path(__file__).parent.parent
SCOPES = {
    "full": ["adapt.scope.kind=full"],
    "tail": ["adapt.scope.kind=tail"],
    "lora, rank 8": ["adapt.scope={kind: lora, rank: 8}"],
    "lora, rank 16": ["adapt.scope={kind: lora, rank: 16}"],
}


def interleaved(
    jobs: dict[str, Callable[[], object]], pairs: int, reference: str
) -> dict[str, tuple[Figure, Figure]]:
    """Milliseconds of each job, and its ratio to the reference: medians."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(pairs + 2):  # the first two warm up
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if round_ > 1:
                times[name].append(time.perf_counter() - started)
    base = times[reference]
    return {
        name: (
            median_of([1e3 * seconds for seconds in spent], "ms"),
            median_of([s / b for s, b in zip(spent, base, strict=True)], "times"),
        )
        for name, spent in times.items()
    }


def show(title: str, found: dict[str, tuple[Figure, Figure]]) -> dict[str, Figure]:
    """Print them; returns each under its name."""
    print(title)
    figures: dict[str, Figure] = {}
    for name, (milliseconds, ratio) in found.items():
        print(f"  {name:<28} {milliseconds.value:8.2f} ms  ratio {ratio.value:5.2f}")
        figures |= {f"{title}: {name} ms": milliseconds, f"{title}: {name}, ratio": ratio}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="eagle3")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    path, family = ROOT / "configs" / "quickstart.yaml", f"drafter.kind={options.family}"
    world = build_world(load_config(path, [family, "workload.max_prompts=1"]))
    torch.set_num_threads(options.threads)
    target, generator = world.target, torch.Generator().manual_seed(0)
    ids_1T = torch.randint(2, target.vocab_size, (1, 512), generator=generator)
    anchors = 1 + torch.randperm(500, generator=generator)[:64]
    steps: dict[str, Callable[[], object]] = {}
    publications: dict[str, Callable[[], object]] = {}
    for name, scope in SCOPES.items():
        drafter = load_drafter(world)
        batch = crops_to_batch(target, drafter, ids_1T, anchors[None], 3)
        config = load_config(path, [family, *scope])
        trainer = build_trainer(config, target, drafter.clone(torch.float32))
        network = drafter.network()
        assert network is not None
        publisher = InPlacePublisher.of_modules(network, target.model, target_check_every=0)
        steps[name] = lambda t=trainer, b=batch: t.update(b, Decision(1))
        publications[name] = lambda t=trainer, p=publisher: p.publish(t.weights())
    found = interleaved(steps, options.pairs, "full")
    figures = show("micro-step, 64 anchors in a context of 512", found)
    figures |= show("publication", interleaved(publications, options.pairs, "full"))

    proposals: dict[str, Callable[[], object]] = {}
    for name, users in {
        "one draft for all": None,
        "adapters, one for all": [0] * options.batch,
        "adapters, one for each": list(range(options.batch)),
    }.items():
        drafter = load_drafter(world)
        feeder = Feeder(drafter, make_texts(target, drafter, options.batch, 2000))
        if users is not None:
            layers = find_layers(drafter.network(), None)
            drafter.adapt(layers, options.batch, 8, 2.0)
            for slot, adapter in enumerate(users):
                drafter.use_adapter(feeder.state, slot, adapter)
        proposals[name] = feeder.step
    found = interleaved(proposals, 4 * options.pairs, "one draft for all")
    figures |= show(f"proposal, {options.batch} requests", found)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
