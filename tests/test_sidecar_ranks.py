"""Several ranks: of a server, which hear of versions at different times, and of a trainer."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from cosched.build.embedded import build_world
from cosched.loop.checksum import checksum
from cosched.sidecar.messages import Version
from cosched.sidecar.together import Together
from cosched.sidecar.versions import Arrival
from cosched.training.ranks import PartedError, Ranks
from tests.helpers.sidecar import (
    Server,
    Trainer,
    configured,
    plain_texts,
    serve_until,
    servers,
    trainer,
)

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
@pytest.mark.long
def test_a_version_serves_in_the_round_in_which_all_ranks_have_it(tmp_path: Path) -> None:
    """Not before, nor while the first wants none; and nobody waits for a rank that has stopped."""
    processes.start_processes(rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    assert torch.load(tmp_path / "0") == (TAKEN, "is told")
    assert torch.load(tmp_path / "1") == (TAKEN, "parts")


def agree(server: Server, trainer: Trainer) -> bool:
    """Whether the one serves what the other has shown last, of which there is a status every second."""
    shown = trainer.status
    if shown["version"] != server.follower.version:
        return False
    assert shown["checksum"] == checksum(server.follower.publisher.served)
    return True


@pytest.mark.slow
@pytest.mark.long
def test_ranks_of_a_trainer_train_one_draft(tmp_path: Path) -> None:
    """Two that torch's launcher starts, with ZeRO: what they publish is proven alike on both, and served; told
    to end, they save it, and go on from it."""
    config = configured(tmp_path)
    expected = plain_texts(build_world(config))
    words = ("adapt.trainer.zero_stage=2",)
    with servers(configured(tmp_path, *words), 1) as (server,):
        with trainer(tmp_path, *words, ranks=2) as first:
            texts = serve_until([server], lambda: server.follower.version >= 3, 180.0)
            assert all(text == expected for text in texts)
            serve_until([server], lambda: agree(server, first))
            pids = [child.pid for child in psutil.Process(first.process.pid).children()]
            assert len(pids) == 2
            first.end()
            assert not any(map(psutil.pid_exists, pids))
            saved = first.status["version"]
        with trainer(tmp_path, "--resume", *words, ranks=2) as second:
            serve_until([server], lambda: server.follower.version >= saved + 2, 180.0)
            assert "cosched goes on from" in second.log.read_text()


@pytest.mark.slow
@pytest.mark.long
def test_a_trainer_ends_where_one_of_its_ranks_does(tmp_path: Path) -> None:
    """Killed: the launcher ends all, and the server goes on with the last good draft."""
    config = configured(tmp_path)
    with servers(config, 1) as (server,), trainer(tmp_path, ranks=2) as process:
        serve_until([server], lambda: server.follower.version >= 1, 180.0)
        *_, last = psutil.Process(process.process.pid).children()
        last.kill()
        assert process.process.wait(90) != 0
        serve_until([server], lambda: bool(server.follower.trouble))
        assert server.answer() == plain_texts(build_world(config))
