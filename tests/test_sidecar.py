"""One trainer in a process of its own and several servers: one draft, faults that stop nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cosched.build.embedded import build_world
from cosched.loop.checksum import checksum
from cosched.records import IDLE_TICK
from cosched.sidecar.messages import Memory
from cosched.sidecar.queue import RoundQueue
from tests.helpers.sidecar import (
    Server,
    configured,
    plain_texts,
    serve_until,
    servers,
    trainer,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]


def served_checksum(server: Server) -> str:
    return checksum(server.follower.publisher.served)


def caught_up(running: list[Server], version: int) -> bool:
    return all(one.follower.version >= version for one in running)


def shown(done: Callable[[], bool]) -> None:
    """Wait until a status says so, of which there is one every second."""
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


def settle(running: list[Server]) -> None:
    """Answer nothing new until all serve what the trainer served last."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for one in running:
            one.follower.on_round(IDLE_TICK)
        time.sleep(0.05)
        versions = {one.follower.version for one in running}
        if len(versions) == 1 and time.monotonic() > until - 3:
            return


def test_servers_of_one_trainer_serve_one_draft_and_a_late_one_gets_it(tmp_path: Path) -> None:
    """Two servers learn from what both serve, with the trainer's checksum on each; one that comes late
    serves the newest version without a round of its own having been learnt; the text is the target's."""
    config = configured(tmp_path)
    expected = plain_texts(build_world(config))
    with trainer(tmp_path) as process, servers(config, 2) as running:
        texts = serve_until(running, lambda: caught_up(running, 3))
        assert all(text == expected for text in texts)
        with servers(config, 1) as (late,):
            settle([*running, late])
            everybody = [*running, late]
            assert len({one.follower.version for one in everybody}) == 1
            assert len({served_checksum(one) for one in everybody}) == 1
            assert late.follower.version >= 3
            assert late.follower.counters.rounds == 0
        shown(lambda: len(process.status["servers"]) == 2)  # the late one has said goodbye
        status = process.status
        assert status["version"] == running[0].follower.version
        assert status["checksum"] == served_checksum(running[0])
        assert status["parent"] == status["version"] - 1
        assert status["refused_messages"] == 0
        seen = status["servers"].values()
        assert all(one["rounds"] and one["shares_memory"] for one in seen)
        assert status["rounds"] == sum(one["rounds"] for one in seen)
        published = [event["version"] for event in running[0].events.of("publication")]
        assert published[-1].draft_checksum == status["checksum"]


def test_what_one_is_asked_to_go_back_from_all_go_back_from(tmp_path: Path) -> None:
    """An operator rolls back on one server: the draft as loaded serves on both, as the next version, and
    learning goes on from there."""
    with trainer(tmp_path), servers(configured(tmp_path), 2) as running:
        loaded = served_checksum(running[0])
        serve_until(running, lambda: caught_up(running, 2))
        settle(running)
        assert served_checksum(running[0]) != loaded
        running[0].follower.roll_back(0)
        settle(running)  # nothing is answered, so nothing new is learnt that would take its place
        assert [served_checksum(one) for one in running] == [loaded, loaded]
        assert running[0].events.of("publication")[-1]["parent"] == 0
        version = running[0].follower.version
        serve_until(running, lambda: caught_up(running, version + 2))


def test_a_killed_trainer_stops_no_server_and_its_successor_goes_on_from_what_serves(
    tmp_path: Path,
) -> None:
    """SIGKILL: texts are the same, the last good draft serves, the trouble is said and taken back; the
    next trainer, which has nothing, takes up what serves, so that versions only rise."""
    config = configured(tmp_path)
    expected = plain_texts(build_world(config))
    with servers(config, 2) as running:
        with trainer(tmp_path) as first:
            serve_until(running, lambda: caught_up(running, 2))
            first.end(signal.SIGKILL)
        settle(running)
        good = running[0].follower.version, served_checksum(running[0])
        texts = serve_until(running, lambda: all(one.follower.trouble for one in running))
        assert all(text == expected for text in texts)
        assert (running[0].follower.version, served_checksum(running[0])) == good
        assert "no trainer" in running[0].events.of("warning")[-1]["reason"]
        with trainer(tmp_path) as second:
            texts = serve_until(running, lambda: caught_up(running, good[0] + 2))
            assert all(text == expected for text in texts)
            assert f"goes on from version {good[0]}" in second.log.read_text()
        assert running[0].follower.trouble is None
        assert running[0].events.of("warning")[-1]["reason"] == "a trainer is there again"
        for one in running:
            assert one.versions == sorted(one.versions)


def test_a_trainer_that_hangs_costs_rows_and_nothing_else(tmp_path: Path) -> None:
    """SIGSTOP: servers do not wait; what does not fit the queue is dropped, the oldest first, and counted.
    When it goes on it is taken up again."""
    config = configured(tmp_path, "adapt.sidecar.queue_rounds=16")
    with trainer(tmp_path) as process, servers(config, 1) as (server,):
        serve_until([server], lambda: caught_up([server], 1))
        os.kill(process.process.pid, signal.SIGSTOP)
        version = server.follower.version
        serve_until([server], lambda: server.follower.trouble is not None)
        assert server.follower.counters.dropped > 0
        assert server.follower.version <= version + 1  # one may have been on its way
        os.kill(process.process.pid, signal.SIGCONT)
        serve_until([server], lambda: server.follower.version > version + 1)
        assert server.follower.trouble is None


def test_what_was_learnt_is_saved_at_the_end_and_gone_on_from(tmp_path: Path) -> None:
    """SIGTERM saves all that the next update depends on; --resume serves that version, and goes on above
    it: a server that comes later, as loaded, gets it at once."""
    config = configured(tmp_path)
    with trainer(tmp_path) as first, servers(config, 1) as (server,):
        serve_until([server], lambda: caught_up([server], 2))
        assert first.end() == 0
        version = first.status["version"]
    with trainer(tmp_path, "--resume") as second, servers(config, 1) as (fresh,):
        settle([fresh])
        serve_until([fresh], lambda: fresh.follower.version > version)
        assert second.status["updates"] >= version
        assert min(v for v in fresh.versions if v) >= version


def test_a_server_with_other_settings_is_told_why_it_learns_nothing(tmp_path: Path) -> None:
    """A rate that differs would be a mistake in one of two files; the key is named, and decoding goes on."""
    config = configured(tmp_path, "adapt.trainer.lr=1e-2")
    with trainer(tmp_path), servers(config, 1) as (server,):
        serve_until([server], lambda: "refuses" in str(server.follower.trouble))
        assert "adapt.trainer.lr" in str(server.follower.trouble)
        assert server.follower.version == 0


def test_a_key_lets_in_who_has_it(tmp_path: Path) -> None:
    """Over TCP with a key: a server that has it learns, one that has another is not heard at all."""
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "other").write_text("o" * 32)
    port = 20000 + os.getpid() % 20000
    address = f"adapt.sidecar.address=tcp://127.0.0.1:{port}"
    config = configured(tmp_path, address, f"adapt.sidecar.key_file={tmp_path}/key")
    other = configured(tmp_path, address, f"adapt.sidecar.key_file={tmp_path}/other")
    words = address, f"adapt.sidecar.key_file={tmp_path}/key"
    with (
        trainer(tmp_path, *words) as process,
        servers(config, 1) as (friend,),
        servers(other, 1) as (stranger,),
    ):
        serve_until([friend, stranger], lambda: caught_up([friend], 2))
        assert stranger.follower.version == 0
        shown(
            lambda: (
                process.status["version"] >= friend.follower.version
                and len(process.status["servers"]) == 1
            )
        )
        assert process.status["refused_messages"] > 0


def test_rows_that_are_not_shared_go_through_the_socket(tmp_path: Path, monkeypatch) -> None:
    """Another machine cannot map a server's memory: then rows are sent, and the same is learnt from them."""
    real = RoundQueue.memory.fget
    assert real is not None

    def elsewhere(queue: RoundQueue) -> Memory:
        """As if that process were not on this machine."""
        return msgspec.structs.replace(real(queue), pid=1 << 29)

    monkeypatch.setattr(RoundQueue, "memory", property(elsewhere))
    with trainer(tmp_path) as process, servers(configured(tmp_path), 1) as (server,):
        serve_until([server], lambda: caught_up([server], 2))
        shown(
            lambda: [one["shares_memory"] for one in process.status["servers"].values()] == [False]
        )
