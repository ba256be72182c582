"""What tests are given: a random target for exact statements, the tiny world for what is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import AutoTokenizer

from cosched.engines.embedded.target import Target
from cosched.settings.schema import Config
from cosched.testing.harness import make_target
from tests.helpers.paths import TINYWORLD

# A busy machine takes its time over an example: that says nothing of what is tested.
hypothesis.settings.register_profile("cosched", deadline=None)
hypothesis.settings.load_profile("cosched")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does


LONGEST = (
    "test_contract",
    "test_guarded_runs",
    "test_sweep",
    "test_run",
    "test_trials",
    "test_tinyworld",
    "test_lossless",
    "test_real_model",
    "test_realworld_teach",
    "test_interruption",
    "test_recipes",
    "test_tenants",
    "test_process",
)
"""The files that take longest, the longest first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, and of the others those with slow tests: one that begins last keeps a process
    busy when others are done."""
    place = {name: number for number, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: (place.get(item.path.stem, len(place)), item.path not in slow),
    )


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


@pytest.fixture
def settings(tmp_path: Path, tinyworld: Path) -> dict:
    """A short experiment over the tiny world, as plain YAML data."""
    return {
        "run": {"name": "one", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1},
        "target": {"path": str(tinyworld / "target")},
        "drafter": {"kind": "eagle3", "path": str(tinyworld / "eagle3"), "window": 48},
        "workload": {
            "prompts": str(tinyworld / "prompts" / "translated.jsonl"),
            "max_new_tokens": 48,
            "max_prompts": 2,
        },
        "arms": ["plain", "frozen", "frozen+window", "adapted"],
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 4},
            "replay": {"window": 32, "anchors": 16},
            "guard": {"kind": "finite"},
        },
    }


@pytest.fixture
def tokenizer() -> Any:
    """The tiny world's, anew: a test may give it another template."""
    return AutoTokenizer.from_pretrained(TINYWORLD / "target")


@pytest.fixture
def configure(tinyworld: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of the tiny world with LoRA; its settings may be overridden."""
    from tests.helpers.adapters import lora_runs  # with DeepSpeed, which few tests need

    return lora_runs(tinyworld, tmp_path)
