"""Ranks of one server that hear of versions at different times: all publish the same in the same round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from cosched.sidecar.messages import Version
from cosched.sidecar.together import Together
from cosched.sidecar.versions import Arrival
from cosched.training.ranks import PartedError, Ranks

COMES = ([3, None, 4, None, None], [None, 3, None, 4, None])  # by rank, round by round
WANTED = [True, True, True, False, True]  # by the first
TAKEN = [None, 3, None, None, 4]


def arrival(version: int | None) -> Arrival | None:
    if version is None:
        return None
    message = Version(version=version, parent=0, checksum="", as_loaded=True, parts=())
    return Arrival(message, None)


def rank(number: int, folder: str) -> None:
    """One of two: five rounds, and a sixth in which the second has stopped."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    ranks = Ranks(number, [0, 1], torch.device("cpu"))
    together = Together(ranks)
    taken = []
    for comes, wanted in zip(COMES[number], WANTED, strict=True):
        found = together.agreed(arrival(comes), wanted and number == 0)
        taken.append(found and found.version.version)
    said = "parts"
    if number == 1:
        ranks.part()
    else:
        try:
            together.agreed(None, wanted=True)
        except PartedError:
            said = "is told"
    assert together.agreed(arrival(5), wanted=True) is None  # they do not meet any more
    torch.save((taken, said), f"{folder}/{number}")


@pytest.mark.slow
def test_a_version_serves_in_the_round_in_which_all_ranks_have_it(tmp_path: Path) -> None:
    """Not before, nor while the first wants none; and nobody waits for a rank that has stopped."""
    processes.start_processes(rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    assert torch.load(tmp_path / "0") == (TAKEN, "is told")
    assert torch.load(tmp_path / "1") == (TAKEN, "parts")
