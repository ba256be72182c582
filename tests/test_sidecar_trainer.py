"""A trainer of servers in this process: what it refuses, what it saves, what it sends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from cosched.build.sidecar import _Agreement, build_sidecar
from cosched.errors import RunFolderError, TrainingError
from cosched.runs import train as command
from cosched.sidecar.learning import Learning
from cosched.sidecar.messages import FromServer, Hello, RowForm, Version
from cosched.sidecar.servers import Server, TrainerStatus
from cosched.sidecar.service import Limits, Service
from cosched.sidecar.versions import Announcement
from cosched.sidecar.wire import Codec
from cosched.telemetry.run_folder import trainer_folder
from tests.helpers.guarded_runs import Events
from tests.helpers.sidecar import configured

HELLO = Hello(
    server="s",
    draft="d",
    settings={},
    window=None,
    acceptance="a",
    num_draft_tokens=3,
    form=RowForm(6, 4, "float32", "float32"),
    version=1,
    checksum="",
    as_loaded=False,
)


FULL = "what was learnt is not saved: No space left on device"


class Socket:
    """Remembers what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.closed = False

    def poll(self, _ms: int) -> int:
        return 0

    def send_multipart(self, frames: Any, *_args: Any, **_more: Any) -> None:
        self.sent.append(frames)

    def get_string(self, _option: int) -> str:
        return "tcp://127.0.0.1:1"

    def close(self, linger: int) -> None:
        self.closed = True


class Saving:
    """Remembers how it ended."""

    ended: bool | None = None
    trouble: str | None = None

    def due(self) -> bool:
        return False

    def take(self, trains: bool = True) -> None: ...

    def end(self, trains: bool) -> None:
        self.ended = trains


def a_service(on_round: Any = None, show: Any = None) -> tuple[Service, Socket, Saving]:
    """A service of a co-scheduler that is at version 2."""
    counters = SimpleNamespace(
        updates=2, skipped_steps=0, losses=[], rounds=9, recent=1.5, refused=0, rolled_back=0
    )
    coscheduler = SimpleNamespace(counters=counters, busy=False, on_round=on_round, sink=Events())
    message = Version(version=2, parent=1, checksum="c", as_loaded=True, parts=())
    versions = SimpleNamespace(
        newest=Announcement(message, b"", b""),
        lineage=SimpleNamespace(version=2, parent=1, checksum="c"),
        kept=(2,),
        renewed=lambda: None,
    )
    socket, saving = Socket(), Saving()
    service = Service(
        cast("Any", socket),
        Codec(None, FromServer),
        Learning(cast("Any", coscheduler), cast("Any", versions), saving),
        lambda _hello: None,
        Limits(1 << 20, 15.0, 100, torch.device("cpu")),
        show,
        clock=lambda: 100.0,
    )
    return service, socket, saving


@pytest.mark.parametrize(("received", "times"), [(1, 1), (2, 0)])
def test_a_version_goes_again_to_who_has_not_got_it(received: int, times: int) -> None:
    """A server that was off or had failed got the whole draft every ``limit_seconds``."""
    service, socket, _ = a_service()
    server = Server(HELLO, None, heard_at=100.0, version=1, received=received)
    service._answer(b"i", server)
    assert len(socket.sent) == 1 + times


def test_what_was_learnt_is_saved_when_learning_cannot_go_on() -> None:
    """A crash saved nothing."""

    def fails(_round: Any) -> None:
        raise TrainingError("no more")

    service, socket, saving = a_service(fails)
    with pytest.raises(TrainingError):
        service.run(lambda: False)
    assert saving.ended is True
    assert socket.closed


def test_what_is_not_saved_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk was known to nobody: a line in the log, once, and a warning for as long as it lasts."""
    shown: list[TrainerStatus] = []
    service, _, saving = a_service(lambda _round: None, shown.append)
    for trouble in (None, FULL, FULL, None):
        saving.trouble = trouble
        service._shown_at = 0.0  # a second and more has gone by
        service.turn()
    assert [status.warning for status in shown] == [None, FULL, FULL, None]
    assert caplog.text.count(FULL) == 1
    assert [event["reason"] for event in service._coscheduler.sink.of("warning")] == [FULL]


def test_nobody_begins_over_what_was_learnt_before(tmp_path: Path) -> None:
    """The states of an earlier start went, one by one, without a word."""
    config = configured(tmp_path)
    (trainer_folder(config.run_folder) / "00000001").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"--resume, or take another run\.name"):
        build_sidecar(config, "adapted", resume=False, sink=Events())


def test_the_trainer_has_the_threads_that_the_file_says(tmp_path: Path, monkeypatch: Any) -> None:
    """``engine.num_threads`` was for who decodes alone."""
    told: list[int] = []

    def stop(*_args: Any) -> None:
        raise TrainingError("that is all")

    monkeypatch.setattr(command, "build_sidecar", stop)
    monkeypatch.setattr(command.torch, "set_num_threads", told.append)
    monkeypatch.setattr(command.signal, "signal", lambda *_args: None)
    with pytest.raises(TrainingError):
        command.train(configured(tmp_path, "engine.num_threads=1"), "adapted", resume=False)
    assert told == [1]


AGREED = _Agreement("d", {}, None, "a", 3, HELLO.form)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"window": 64}, "drafter.window"),
        ({"acceptance": "sampled"}, "engine.acceptance"),
        ({"num_draft_tokens": 5}, "drafter.num_draft_tokens"),
        ({"form": RowForm(6, 8, "float32", "float32")}, "adapt.replay.teacher"),
    ],
)
def test_what_differs_is_named_by_its_key(change: dict[str, Any], key: str) -> None:
    """An operator looks for it in the file."""
    assert AGREED(HELLO) is None
    assert key in str(AGREED(msgspec.structs.replace(HELLO, **change)))
