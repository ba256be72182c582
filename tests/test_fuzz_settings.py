"""Damaged configurations: refused by a clear error of ours, or taken; nothing else, and nothing written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosched.errors import CoschedError
from cosched.settings.load import load_config, to_yaml
from cosched.sweep.plan import load_plan
from tests.helpers.fuzz import (
    LONGEST_MESSAGE,
    NASTY,
    as_json,
    cases,
    damaged_text,
    damaged_tree,
    little_memory,
    nothing_written,
    only_ours,
    places_in,
    random_tree,
)
from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
TEXTS = [path.read_text() for path in FILES if not path.name.startswith("sweep")]
TREES = [yaml.safe_load(text) for text in TEXTS]
KEYS = sorted({str(step) for tree in TREES for _, step in places_in(tree)})
VALUES = [container[step] for tree in TREES for container, step in places_in(tree)]
WORDS = [f"{section}.{key}" for section in ("adapt", "drafter", "engine", "adapt.policy", "run",
         "variants.x", "drafts.y", "drafts.y.adapt.loss", "workload") for key in KEYS]  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative folders of the files are not there, and what is written would be seen."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    return there


def damaged(rng: random.Random) -> tuple[bytes, list[str]]:
    """A file, and what is said behind it on the command line."""
    kind, words = rng.random(), []
    if kind < 0.5:
        given = as_json(damaged_tree(rng, rng.choice(TREES)))  # which YAML is, too
    elif kind < 0.7:
        given = as_json(random_tree(rng, KEYS, VALUES))
    elif kind < 0.9:
        text = rng.choice(TEXTS)
        for _ in range(rng.choice((1, 1, 3))):
            text = damaged_text(rng, text)
        given = text.encode(errors="surrogatepass")
    else:
        given = rng.choice(TEXTS).encode()
    if kind > 0.9 or rng.random() < 0.1:
        words = [f"{rng.choice(WORDS)}={_word(rng)}" for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.2:
            words[0] = damaged_text(rng, words[0])
    return given, words


def _word(rng: random.Random) -> str:
    value: Any = rng.choice(NASTY if rng.random() < 0.5 else VALUES)
    return value if isinstance(value, str) else as_json(value).decode()


@pytest.mark.slow
@pytest.mark.long
def test_a_damaged_file_is_one_clear_error(elsewhere: Path, tmp_path: Path) -> None:
    """Mutated files of ``configs/``, trees of their keys and values, and overrides. What is taken can be
    written out, and read again as the same."""
    path = tmp_path / "experiment.yaml"
    with nothing_written(elsewhere), little_memory():
        for case, rng in cases("settings", 80):
            data, words = damaged(rng)
            path.write_bytes(data)
            with only_ours(case, (data, words)):
                config = load_config(path, words)
                again = to_yaml(config)
                path.write_text(again, errors="surrogatepass")
                assert to_yaml(load_config(path)) == again


def test_a_file_cannot_take_all_memory_or_time(elsewhere: Path, tmp_path: Path) -> None:
    """A few hundred bytes of YAML that stand for billions of values, and for a tree without a bottom."""
    laughs = "run: {name: x}\na0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    path = tmp_path / "experiment.yaml"
    for text in (
        laughs, "a: &a [*a]", "a: &a {b: *a}", "[" * 100_000, "{a: " * 5000, "a: " + "9" * 5000,
        "- " * 20_000, "run: {name: x}\n" + "? " * 5000,
    ):  # fmt: skip
        path.write_text(text)
        with little_memory(), pytest.raises(CoschedError) as caught:
            load_config(path)
        assert len(str(caught.value)) < LONGEST_MESSAGE


def test_a_damaged_sweep_is_one_clear_error(elsewhere: Path, tmp_path: Path) -> None:
    """Axes, cells and texts of a sweep are settings too; the experiment behind it is as shipped."""
    path = ROOT / "configs" / "sweep_tiny.yaml"
    tree = yaml.safe_load(path.read_text()) | {"base": str(path.parent / "quickstart.yaml")}
    small = {**tree, "grid": {"adapt.trainer.lr": [1e-3, 1e-4]}}
    with nothing_written(elsewhere), little_memory():
        for case, rng in cases("sweeps", 5, share=0.02):
            data = as_json(damaged_tree(rng, small))
            (tmp_path / "sweep.yaml").write_bytes(data)
            with only_ours(case, data):
                load_plan(tmp_path / "sweep.yaml")
