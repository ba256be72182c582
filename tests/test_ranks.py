"""Two processes that train one draft: what fails on one must not leave the other waiting."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from cosched.training import deepspeed_trainer
from cosched.training import ranks as ranks_module
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.group import TrainingGroup
from cosched.training.ranks import PartedError, Ranks
from cosched.training.shares import Share

Wrong = Literal["", "fails", "hangs", "loss", "gradient"]
SHORT = timedelta(seconds=10)  # that a rank waits for another; these take their steps in a second


class Loss(nn.Module):
    """(w - x)^2 for a batch of numbers; what goes wrong in it is said.

    ``fails`` and ``hangs`` are of its backward pass, ``loss`` and ``gradient`` are not finite in the second
    step.
    """

    def __init__(self, wrong: Wrong = "") -> None:
        super().__init__()
        self.network = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.network.weight.copy_(torch.tensor([[1.0, -2.0]]))
        self._wrong: Wrong = wrong
        self._steps = 0
        self.lost_mass = None

    def begin_update(self, *batches: Any, objective: Any) -> None:
        pass

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self._steps += 1
        weight = self.network.weight
        if self._wrong in {"fails", "hangs"} or (self._wrong == "gradient" and self._steps == 2):
            weight = _Backward.apply(weight, self._wrong)
        bad = self._wrong == "loss" and self._steps == 2
        return ((weight - batch) ** 2).mean() * (float("nan") if bad else 1.0)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, wrong: Wrong) -> torch.Tensor:
        context.wrong = wrong
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        if context.wrong == "fails":
            raise RuntimeError("out of memory")
        if context.wrong == "hangs":
            time.sleep(2 * SHORT.total_seconds())
            return gradient, None
        return gradient * float("nan"), None


def rank(number: int, folder: str, stage: int, wrong: Wrong) -> None:
    """One of two: trains three steps, and writes what came of it; what goes wrong does on the second."""
    ranks_module.PATIENCE = SHORT
    os.environ["LOCAL_RANK"] = "5"  # of whoever started us; there is no such device
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    ranks = Ranks(number, [0, 1], torch.device("cpu"))
    group = TrainingGroup(number, 2, ranks.together, ranks.alone, ranks.meet)
    loss: Any = Loss(wrong if number == 1 else "")
    trainer = DeepSpeedTrainer(loss, ["weight"], stage, 0.1, 1.0, group=group)
    dist.barrier()
    started, said, skipped = time.monotonic(), "done", []
    try:
        for step in range(3):
            batch: Any = torch.tensor([[float(number), 3.0 * step]])
            skipped.append(int(trainer.step([Share(batch)])[1]))
    except PartedError:
        said = "parted"
    except RuntimeError as error:
        ranks.part()  # as the adaptation does
        said = str(error)
    weights = trainer.weights()["weight"].flatten().tolist()
    local = (os.environ["LOCAL_RANK"], trainer._engine.local_rank)
    torch.save((said, time.monotonic() - started, weights, local, skipped), f"{folder}/{number}")


@pytest.fixture(autouse=True)
def _imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked from a process that has DeepSpeed: its import takes longer than three steps."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the trainer has it
    multiprocessing.set_forkserver_preload(["deepspeed"])


def run(folder: Path, stage: int, wrong: Wrong = "") -> list[Any]:
    arguments = (str(folder), stage, wrong)
    processes.start_processes(rank, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / str(number)) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_rank_that_fails_in_its_backward_pass_is_not_waited_for(
    tmp_path: Path, stage: int
) -> None:
    """The other was left in a collective for a minute, which NCCL answers by ending the process."""
    well, failed = run(tmp_path, stage, "fails")
    assert (well[0], failed[0]) == ("parted", "out of memory")
    assert well[1] < SHORT.total_seconds()
    assert well[2] == failed[2] == [1.0, -2.0]


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    """The other gives the step up, and so does this one when it comes round: neither has taken it."""
    well, hung = run(tmp_path, 1, "hangs")
    assert "done" not in (well[0], hung[0])
    assert SHORT.total_seconds() - 1 < well[1] < 3 * SHORT.total_seconds()
    assert well[2] == hung[2] == [1.0, -2.0]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    tmp_path: Path, stage: int, wrong: Wrong
) -> None:
    """Else their drafts part without a word; the steps before and behind it are taken."""
    first, second = run(tmp_path, stage, wrong)
    assert first[0] == second[0] == "done"
    assert first[4] == second[4] == [0, 1, 0]
    assert first[2] == second[2] != [1.0, -2.0]
    assert all(map(math.isfinite, first[2]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_take_the_steps_that_one_would(tmp_path: Path, stage: int) -> None:
    """Gradients are known before DeepSpeed is asked, and are the same to the bit; ranks that share a
    batch evenly take the mean. Nor does it matter which device somebody's LOCAL_RANK names."""
    first, second = run(tmp_path, stage)
    assert first[2] == second[2]
    assert first[3] == second[3] == ("5", 0)
    alone: Any = Loss()
    optimizer = torch.optim.AdamW(
        alone.network.parameters(), lr=0.1, betas=deepspeed_trainer.BETAS, weight_decay=0.0
    )
    for step in range(3):
        parts = [alone(torch.tensor([[float(number), 3.0 * step]])) for number in range(2)]
        optimizer.zero_grad()
        torch.stack(parts).mean().backward()
        torch.nn.utils.clip_grad_norm_(alone.network.parameters(), 1.0)
        optimizer.step()
    assert first[2] == pytest.approx(alone.network.weight.flatten().tolist(), abs=1e-6)
