"""Which rows of what was served teach, and how much, by what the drafter knew when it drafted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosched.build import build_coscheduler, build_world, load_drafter
from cosched.config import load_config
from cosched.errors import ConfigError
from cosched.experiment import Experiment
from cosched.records import Rows, Segment, ServedBlock, VerifyRound
from cosched.replay import ReplayBuffer, ReplayLimits
from cosched.telemetry.run_folder import NoEvents

K, WIDTH = 4, 8
QUICKSTART, SAMPLED = Path("configs/quickstart.yaml"), Path("configs/sampled.yaml")


def buffer_with_blocks(rows: Rows, refused_weight: float) -> ReplayBuffer:
    """One request of 20 rows with blocks that were accepted to 0, 2 and 4 of 4 drafts."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 64, K, 1 << 20, 1 << 30, 0, 4 * WIDTH), rows, None, refused_weight
    )
    tokens = torch.arange(21)
    segment = Segment("r", 0, tokens, None, torch.randn(20, WIDTH))
    blocks = tuple(
        ServedBlock("r", anchor, tokens[:K], torch.randn(K, WIDTH), accepted, accepted + 1)
        for anchor, accepted in ((5, 0), (6, 2), (9, 4))
    )
    buffer.collect(VerifyRound(0, 0, (segment,), blocks, (), 0.0, 0.0, 1))
    return buffer


@pytest.mark.parametrize(
    ("rows", "refused_weight", "expected"),
    [
        # Row a, of the refused token itself, stands on accepted text and counts in full.
        ("accepted", 1.0, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        ("all", 1.0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ("all", 0.25, [[1, 0.25, 0.25, 0.25], [1, 1, 1, 0.25], [1, 1, 1, 1]]),
        ("all", 0.0, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_weights_behind_a_refusal(
    rows: Rows, refused_weight: float, expected: list[list[float]]
) -> None:
    """Cut, kept, or kept with less weight; never the rows up to the refusal."""
    batch = buffer_with_blocks(rows, refused_weight).sample()
    assert batch is not None
    assert batch.weights_RNK[0].tolist() == expected
    assert batch.anchors_RN[0].tolist() == [5, 6, 9]


def test_committed_text_has_no_refusals() -> None:
    """``rows: delayed`` teaches what was said: every row counts, whatever the weight of refusals."""
    batch = buffer_with_blocks("delayed", 0.25).sample()
    assert batch is not None
    assert batch.anchors_RN[0].tolist() == list(range(1, 17))
    assert batch.weights_RNK.min() == 1


@pytest.mark.parametrize(("kind", "weight"), [("eagle3", 1.0), ("dflash", 0.3), ("pard", 0.3)])
def test_a_chain_keeps_its_own_path(kind: str, weight: float) -> None:
    """A chain is taught on the path that it drafted itself; a block did not know its own path."""
    config = load_config(
        SAMPLED,
        [f"drafter.kind={kind}", "adapt.loss.rows=all", "workload.max_prompts=1"],
    )
    world = build_world(config)
    coscheduler = build_coscheduler(
        config, world.target, load_drafter(world), None, None, NoEvents()
    )
    assert coscheduler._buffer._refused_weight == weight


def test_recording_for_other_drafters(tmp_path: Path) -> None:
    """Layers that the target lacks are refused; so is an arm that has only its own features."""

    def experiment(*overrides: str) -> None:
        config = load_config(
            QUICKSTART,
            ["workload.max_prompts=1", f"run.dir={tmp_path}", *overrides],
        )
        Experiment(config, record=True)

    with pytest.raises(ConfigError, match=r"record\.feature_layers.*0 to 15.*16.*not 17"):
        experiment("record.feature_layers=[17]")
    with pytest.raises(ConfigError, match=r"'frozen'.*plain as the first arm"):
        experiment("record.feature_layers=[3]", "arms=[frozen]")
