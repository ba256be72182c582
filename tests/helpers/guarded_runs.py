"""Runs of the sampled experiment under a guard that decides early, and what they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosched.build.embedded import Arm, World, build_world
from cosched.settings.load import load_config

SAMPLED = Path("configs/sampled.yaml")
SOON = "adapt.guard={kind: shadow, anchors: 16, false_publish: 0.5}"  # tests are short
FAR = (
    "workload.prompts=null",
    "workload.documents=tinyworld/documents/translated.jsonl",
    "adapt.loss.kind=jensen_shannon",
    "adapt.trainer.lr=1e-3",
    "adapt.policy.num_steps=4",
)
"""Text of which there is much to learn."""


class Events:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.all.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.all if name == kind]

    @property
    def verdicts(self) -> list[Any]:
        return [event["verdict"] for event in self.of("verdict")]


def world_of(*overrides: str, domain: str = "code", tokens: int = 256, prompts: int = 1) -> World:
    """Greedy, on prompts of a domain; the guard is SOON's where none is named."""
    guarded = any(
        override.startswith(("adapt.guard=", "adapt.guard.kind")) for override in overrides
    )
    return build_world(
        load_config(
            SAMPLED,
            [
                f"workload.prompts=tinyworld/prompts/{domain}.jsonl",
                f"workload.max_new_tokens={tokens}",
                f"workload.max_prompts={prompts}",
                "workload.temperature=0",
                "adapt.replay.window=128",
                "adapt.policy.rounds=4",
                *(() if guarded else (SOON,)),
                *overrides,
            ],
        )
    )


def decode(world: World, arm: Arm) -> list[list[int]]:
    return [list(done.tokens) for done in arm.engine.generate(world.requests)]
