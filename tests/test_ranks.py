"""Two processes that train one draft: what fails on one must not leave the other waiting."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from cosched.training import deepspeed_trainer
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.group import TrainingGroup
from cosched.training.ranks import PartedError, Ranks


class Loss(nn.Module):
    """(w - x)^2 for a batch of numbers; its backward pass raises where it is told to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.network = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.network.weight.copy_(torch.tensor([[1.0, -2.0]]))
        self._fails = fails
        self.lost_mass = None

    def begin_update(self, batch: Any, objective: Any) -> None:
        pass

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        weight = self.network.weight
        if self._fails:
            weight = _Fails.apply(weight)
        return ((weight - batch) ** 2).mean()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")


def rank(number: int, folder: str, stage: int, fails: bool) -> None:
    """One of two: trains three steps, and writes what came of it."""
    os.environ["LOCAL_RANK"] = "5"  # of whoever started us; there is no such device
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    ranks = Ranks(number, [0, 1], torch.device("cpu"))
    group = TrainingGroup(number, 2, ranks.together, ranks.alone, ranks.meet)
    loss: Any = Loss(fails and number == 1)
    trainer = DeepSpeedTrainer(loss, ["weight"], stage, 0.1, 1.0, group=group)
    dist.barrier()
    started, said = time.monotonic(), "done"
    try:
        for step in range(3):
            trainer.step(torch.tensor([[float(number), 3.0 * step]]))  # type: ignore[arg-type]
    except PartedError:
        said = "parted"
    except RuntimeError as error:
        ranks.part()  # as the adaptation does
        said = str(error)
    weights = trainer.weights()["weight"].flatten().tolist()
    local = (os.environ["LOCAL_RANK"], trainer._engine.local_rank)
    torch.save((said, time.monotonic() - started, weights, local), f"{folder}/{number}")


@pytest.fixture(autouse=True)
def _imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked from a process that has DeepSpeed: its import takes longer than three steps."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the trainer has it
    multiprocessing.set_forkserver_preload(["deepspeed"])


def run(folder: Path, stage: int, fails: bool) -> list[Any]:
    arguments = (str(folder), stage, fails)
    processes.start_processes(rank, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / str(number)) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_rank_that_fails_in_its_backward_pass_is_not_waited_for(
    tmp_path: Path, stage: int
) -> None:
    """The other was left in a collective for a minute, which NCCL answers by ending the process."""
    well, failed = run(tmp_path, stage, fails=True)
    assert (well[0], failed[0]) == ("parted", "out of memory")
    assert well[1] < 30
    assert well[2] == [1.0, -2.0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_take_the_steps_that_one_would(tmp_path: Path, stage: int) -> None:
    """Gradients are known before DeepSpeed is asked, and are the same to the bit; ranks that share a
    batch evenly take the mean. Nor does it matter which device somebody's LOCAL_RANK names."""
    first, second = run(tmp_path, stage, fails=False)
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
