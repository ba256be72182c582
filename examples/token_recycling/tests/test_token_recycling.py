"""What is its own: the matrix learns what the target says, and whole runs go through."""

from __future__ import annotations

import json
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from token_recycling.drafter import TokenRecycling, TokenRecyclingSettings, levels

from cosched.errors import CheckpointError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.protocols import Choose
from cosched.records import Refused, Segment
from cosched.report.html import write_report
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import RunFolder
from cosched.testing.harness import make_requests, make_target, serve

ROOT = Path(__file__).parents[3]
SETTINGS = TokenRecyclingSettings(kind="token_recycling", num_draft_tokens=3)


def test_it_drafts_what_the_target_said_last_time() -> None:
    """Behind a token that stood in the text come the target's best ones, and behind them their own."""
    target = make_target()
    drafter = TokenRecycling.load(SETTINGS, target)
    state = drafter.new_state(1, 16, None)
    hidden = torch.randn(4, target.hidden_size)
    refused = Refused(torch.tensor([7, 8]), hidden[:2], None)
    drafter.observe(state, 0, Segment("r", 0, torch.tensor([5, 6, 5, 7, 6]), hidden, None, refused))
    expected = target.head(hidden).topk(4).indices
    assert torch.equal(state.best_BVW[0, 8], expected[1])  # of a refused draft
    assert torch.equal(state.best_BVW[0, 7], expected[3])  # refused and committed: text counts
    assert torch.equal(state.best_BVW[0, 6], expected[1])
    assert torch.equal(state.best_BVW[0, 5], expected[2])  # the later row of the two
    state.best_BVW[0, expected[1, 0]] = torch.tensor([9, 10, 11, 12])
    state.best_BVW[0, expected[1, 1]] = torch.tensor([20, 21, 22, 23])
    proposal = drafter.propose(state, 1, NothingToChooseFrom(), 2)
    first, second, third, fourth = expected[1].tolist()
    assert proposal.tokens_BK[0].tolist() == [
        *(first, second, third, fourth),
        *(9, 10, 11, 12),
        *(20, 21),
        *(third, fourth),  # unknown: they come again
    ]
    assert proposal.parents_BK[0].tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3, 4]
    assert proposal.logits_BKV is None


def test_a_tree_has_the_paths_whose_ranks_multiply_to_its_width() -> None:
    """All of them, each once, by an obvious search; with a width of one it is one path."""
    for width in (1, 4, 6):
        paths = {
            path
            for depth in (1, 2, 3)
            for path in product(range(1, width + 1), repeat=depth)
            if prod(path) <= width
        }
        rows: list[tuple[int, ...]] = [()]
        for level in levels(width, 3):
            rows += [
                (*rows[row], rank + 1) for row, rank in zip(level.rows, level.ranks, strict=True)
            ]
        assert len(rows) == len(set(rows))
        assert set(rows[1:]) == paths


def test_behind_an_unknown_token_it_comes_again() -> None:
    """A proposal is full: what nothing is known of is guessed, and verified as everything is."""
    drafter = TokenRecycling.load(SETTINGS, make_target())
    state = drafter.new_state(2, 16, None)
    state.anchor_B[1] = 5
    proposal = drafter.propose(state, 2, NothingToChooseFrom(), 3)
    assert proposal.tokens_BK.tolist() == [[0] * 25, [5] * 25]


class NothingToChooseFrom(Choose):
    def __call__(self, k: int, logits_BV: torch.Tensor, /) -> torch.Tensor:
        raise AssertionError("it has no logits")

    def siblings(self, first: int, logits_BRV: torch.Tensor, rows_BW: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it has no logits")


def test_a_request_learns_for_itself() -> None:
    """What one request has seen does not change the drafts of the next."""
    target = make_target()
    requests = make_requests(target, count=2, prompt=9, new=60)
    both = serve(target, TokenRecycling.load(SETTINGS, target), requests)
    alone = serve(target, TokenRecycling.load(SETTINGS, target), requests[1:])
    paths = [
        torch.stack([b.path_K for r in rounds for b in r.blocks if b.request_id == "r1"])
        for rounds in (both, alone)
    ]
    assert torch.equal(*paths)


def test_a_matrix_for_another_target_is_refused(tmp_path: Path) -> None:
    TokenRecycling.load(SETTINGS, make_target()).save(tmp_path / "matrix")
    found = TokenRecyclingSettings(kind="token_recycling", path=str(tmp_path / "matrix"))
    with pytest.raises(CheckpointError, match=r"\(64, 4\) tokens and candidates, not \(32, 4\)"):
        TokenRecycling.load(found, make_target(vocab_size=32))
    nowhere = TokenRecyclingSettings(kind="token_recycling", path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"drafter\.path: no matrix"):
        TokenRecycling.load(nowhere, make_target())


def test_check_says_what_a_run_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation sketches the drafter over a target that has sizes and no weights."""
    monkeypatch.chdir(ROOT)
    config = load_config(Path(__file__).parents[1] / "experiment.yaml")
    target, drafter = sketch(config)
    found = footprint(config, target, drafter)
    assert (found.num_draft_parameters, found.num_trained, found.replay) == (0, 0, 0)
    assert found.draft_store == 8 * 4 * target.vocab_size  # the matrix of one request


@pytest.mark.parametrize("teacher", ["token_recycling", "eagle3"])
def test_the_experiment_runs(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the shipped file to a report; and our loss and policy teach a draft with a network."""
    monkeypatch.chdir(ROOT)
    overrides = [
        f"run.dir={tmp_path}", "workload.max_prompts=2", "workload.max_new_tokens=48",
        "adapt.policy.below=9", "engine.num_threads=1",
    ]  # fmt: skip
    if teacher == "eagle3":
        overrides += ["drafter.kind=eagle3", "drafter.path=tinyworld/eagle3"]
    config = load_config(Path(__file__).parents[1] / "experiment.yaml", overrides)
    folder = RunFolder(config.run_folder)
    folder.create()
    summary = Experiment(config).run(folder)
    page = write_report(folder.path).read_text()
    arms = summary.arms
    assert {arm.lossless_mismatches for arm in arms.values()} == {0}
    assert arms["plain"].tau == 1
    events = [json.loads(line) for line in (folder.path / "events.jsonl").open()]
    updates = [event for event in events if event["kind"] == "update"]
    assert len(updates) == arms["adapted"].updates
    if teacher == "eagle3":
        assert arms["adapted"].updates >= 4
        assert "learns by itself" not in page
    else:
        assert arms["adapted"].updates == arms["adapted"].versions == 0
        assert arms["adapted"].seconds["update"] == 0
        assert "learns by itself" in page
        assert arms["adapted"].tau == arms["frozen"].tau > 1
        assert (folder.path / "checkpoints" / "adapted" / "model.safetensors").exists()
