"""Runs with LoRA: their settings, trainers and pools, and what they serve."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosched.build.coscheduler import build_pool
from cosched.build.trainer import build_trainer
from cosched.engines.embedded.target import Target
from cosched.engines.request import FinishedRequest, GenerationRequest
from cosched.loop.per_adapter import CoschedulerPool
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import NoEvents
from cosched.testing.harness import make_engine

FAMILIES = ("eagle3", "dflash", "pard")

Configure = Callable[..., Config]
"""The settings of such a run, with overrides and the family of its draft."""


def lora_runs(tinyworld: Path, tmp_path: Path) -> Configure:
    """Of the tiny world; settings may be overridden."""
    settings = {
        "run": {"name": "scopes", "dir": str(tmp_path)},
        "target": {"path": f"{tinyworld}/target"},
        "drafter": {"num_draft_tokens": 3},
        "workload": {"prompts": f"{tinyworld}/prompts/translated.jsonl", "max_new_tokens": 64},
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 4, "num_steps": 2},
            "replay": {"window": 64, "anchors": 16},
            "scope": {"kind": "lora", "rank": 4, "alpha": 8},
            "trainer": {"lr": 3e-3},
            "guard": {"kind": "finite"},
        },
    }
    path = tmp_path / "scopes.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML

    def configured(*overrides: str, family: str = "eagle3") -> Config:
        drafter = (f"drafter.kind={family}", f"drafter.path={tinyworld}/{family}")
        return load_config(path, [*drafter, *overrides])

    return configured


def make_trainer(config: Config, target: Target, drafter: Any) -> Any:
    return build_trainer(config, target, drafter.clone(torch.float32))


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same names and bits; -0 is not 0."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def examples(target: Target) -> Iterator[Any]:
    """Every kind of checkpoint of the three families."""
    for family in FAMILIES:
        torch.manual_seed(1)
        yield from DRAFTERS.get(family).examples(target, 3).values()


def make_pool(config: Config, target: Target, drafter: Any) -> CoschedulerPool:
    return build_pool(config, target, drafter, None, NoEvents())


def owned(requests: list[GenerationRequest], *tenants: str) -> list[GenerationRequest]:
    """The requests, of those tenants in turn."""
    return [
        replace(request, tenant=tenants[index % len(tenants)])
        for index, request in enumerate(requests)
    ]


def run_pool(
    target: Target, drafter: Any, pool: CoschedulerPool, requests: list[GenerationRequest]
) -> dict[str, FinishedRequest]:
    engine = make_engine(target, drafter, requests, 3, observer=pool, admit=pool.admit)
    return {done.request.id: done for done in engine.generate(requests)}


def serving(pool: CoschedulerPool) -> list[dict[str, Tensor]]:
    """What each adapter's publisher writes into, as it is now."""
    publishers: list[Any] = [part.publisher for part in pool.parts]
    return [copied(publisher._serving.draft) for publisher in publishers]
