"""The shared folder of a server: what its ranks report, and what operators ask of it."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cosched import cli
from cosched.doctor import folders
from cosched.engines.sglang.launcher.run_directory import LONGEST, RunDirectory
from cosched.engines.sglang.operators.control import Client, SocketOperator
from cosched.engines.sglang.worker.operator import Command, Status
from cosched.errors import ConfigError, ControlError
from tests.helpers.cli import run_cli
from tests.helpers.serving import STATUS

# --- reports --------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[RunDirectory]:
    made = RunDirectory.create("run: {name: x}")
    yield made
    made.remove()
    assert not made.path.exists()


def test_a_temporary_folder_too_deep_for_a_socket_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SGLang is started, and as the doctor says it; one that is just not too deep will do."""
    fits = tmp_path / ("x" * (LONGEST - len(f"{tmp_path}/")))
    fits.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(fits))
    assert [found.level for found in folders()] == ["ok"]
    directory = RunDirectory.create("run: {name: x}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.bind(str(directory.path / "tmp12345678"))  # as SGLang names its own
    directory.remove()
    monkeypatch.setattr("tempfile.tempdir", f"{fits}x")
    with pytest.raises(ConfigError, match=rf"TMPDIR: .* has {LONGEST + 1} bytes"):
        RunDirectory.create("run: {name: x}")
    assert [found.level for found in folders()] == ["bad"]


def test_the_shared_folder_is_private(directory: RunDirectory) -> None:
    """Who can write there can command the server."""
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_rank_that_did_not_report_stops_the_launch(directory: RunDirectory) -> None:
    """SGLang only logs a plugin that fails: without this the server would run unadapted."""
    directory.report(0, "COSCHED_EAGLE3")
    directory.check_reports(1)
    with pytest.raises(ConfigError, match="no adapting worker reported from rank 1 of 2"):
        directory.check_reports(2)


def test_the_reason_of_a_rank_that_failed_is_told(directory: RunDirectory) -> None:
    """It is in another process's log otherwise, under a traceback."""
    directory.report(0, "COSCHED_EAGLE3", "adapt.scope.kind: no such scope")
    with pytest.raises(ConfigError, match=r"cannot start: adapt\.scope\.kind"):
        directory.check_reports(1)


# --- control --------------------------------------------------------------------------------


@contextmanager
def served(
    directory: RunDirectory,
    answer: Callable[[Command], Status | str] | None,
    patience: float = 20.0,
    **options: Any,
) -> Iterator[tuple[Client, SocketOperator]]:
    """An operator, with a thread that plays the scheduler; none where ``answer`` is None."""
    operator = SocketOperator(directory.socket(), patience=patience, **options)
    stop = threading.Event()

    def schedule() -> None:
        while not stop.wait(0.002):
            for command, reply in operator.asked():
                reply(answer(command))  # type: ignore[misc]

    thread = threading.Thread(target=schedule) if answer else None
    if thread:
        thread.start()
    try:
        yield Client([directory.socket()]), operator
    finally:
        stop.set()
        if thread:
            thread.join()
        operator.close()


def test_a_command_reaches_the_scheduler_and_its_answer_comes_back(directory: RunDirectory) -> None:
    """Every verb, with what belongs to it."""
    seen: list[Command] = []

    def answer(command: Command) -> Status:
        seen.append(command)
        return STATUS

    with served(directory, answer) as (client, _):
        assert stat.S_IMODE(directory.socket().stat().st_mode) == 0o600
        assert client.status() == client.on() == client.off() == client.rollback(3) == STATUS
    assert [command.verb for command in seen] == ["status", "on", "off", "rollback"]
    assert seen[-1].version == 3


def test_a_refusal_comes_back_as_the_message_that_it_is(directory: RunDirectory) -> None:
    """The scheduler knows which versions are kept."""
    with (
        served(directory, lambda _: "version 7 is not kept") as (client, _),
        pytest.raises(ControlError, match="version 7 is not kept"),
    ):
        client.rollback(7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "malformed"),
        (b'{"verb": "dance"}\n', "dance.*there are status, on"),
        (b'{"verb": "rollback"}\n', "version must be 0 or more, got None"),
        (b'{"verb": "save", "path": "relative"}\n', "path must be absolute"),
        (b"\n", "truncated|malformed"),
    ],
)
def test_nonsense_on_the_socket_is_answered(
    directory: RunDirectory, line: bytes, message: str
) -> None:
    """It never gets as far as the scheduler, and the next client is served."""
    import re

    with served(directory, None) as (client, operator):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(directory.socket()))
            connection.sendall(line)
            reply = json.loads(connection.makefile().readline())
        assert re.search(message, reply["error"], re.IGNORECASE), reply
        assert operator.asked() == []
        assert client is not None


def test_a_scheduler_that_does_not_come_round_is_not_waited_for(directory: RunDirectory) -> None:
    """And what was not taken is not done later, when nobody expects it any more."""
    with served(directory, None, patience=0.05) as (client, operator):
        reply = client.reply(Command(verb="off"))
        assert reply.late
        assert "withdrawn" in (reply.error or "")
        assert operator.asked() == []


def test_a_command_that_was_taken_is_said_to_be_under_way(directory: RunDirectory) -> None:
    """It cannot be withdrawn: the message must not say so."""
    taken: list[Any] = []
    with served(directory, None, patience=0.2) as (client, operator):

        def take() -> None:
            while not taken:
                taken.extend(operator.asked())
                time.sleep(0.002)

        thread = threading.Thread(target=take)
        thread.start()
        reply = client.reply(Command(verb="on"))
        thread.join()
    assert "under way" in (reply.error or "")


def test_a_folder_that_is_taken_is_refused_before_the_scheduler_is_asked(
    directory: RunDirectory, tmp_path: Path
) -> None:
    """Nothing is written over; an empty one is as good as none."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with served(directory, lambda _: STATUS) as (client, _):
        with pytest.raises(ControlError, match="taken exists and is not empty"):
            client.save(tmp_path / "taken")
        assert client.save(tmp_path / "empty") == STATUS


def test_nobody_at_the_socket_is_said_plainly(tmp_path: Path) -> None:
    """The server has stopped, or it is another's."""
    with pytest.raises(ControlError, match="no server answers at"):
        Client([tmp_path / "control.sock"]).status()


def test_statuses_are_shown_now_and_then_and_the_last_one_always(directory: RunDirectory) -> None:
    """Metrics must not cost every round, and must not stay behind when rounds stop."""
    now, shown = [0.0], []
    operator = SocketOperator(directory.socket(), show=shown.append, clock=lambda: now[0])
    try:
        statuses = [msgspec.structs.replace(STATUS, rounds=number) for number in range(5)]
        for status in statuses:
            operator.show(lambda status=status: status)
        assert shown == statuses[:1]
        operator.asked()
        assert shown == statuses[:1]
        now[0] = 1.0
        operator.asked()  # an idle tick
        assert shown == [statuses[0], statuses[-1]]
        operator.asked()
        assert len(shown) == 2
        operator.show(lambda: msgspec.structs.replace(STATUS, failure="broken"), at_once=True)
        assert shown[-1].failure == "broken"
    finally:
        operator.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "there are status"),
        (["rollback"], "give a version"),
        (["rollback", "-1"], "No such option|give a version"),
        (["save"], "give a NAME"),
        (["on", "now"], "takes nothing"),
        (["status", "--url", "ftp://x"], "is no address"),
        (["status", "--url", "http://127.0.0.1:1"], "does not answer"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_message(words: list[str], message: str) -> None:
    """No traceback, and nothing is sent."""
    import re

    result = CliRunner().invoke(cli.app, ["control", *words])
    assert result.exit_code != 0
    assert re.search(message, f"{result.output} {result.exception}")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["frob"], 2),
        (["rollback", "abc"], 2),
        (["rollback"], 2),
        (["save"], 2),
        (["on", "now"], 2),
        (["status", "--url", "ftp://x"], 2),
        (["status", "--url", "http://127.0.0.1:1"], 1),
    ],
)
def test_a_mistake_at_the_command_line_is_bad_input(words: list[str], code: int) -> None:
    """The documentation says 2 for it, and 1 where a server does not do as it is told."""
    assert run_cli("control", *words)[0] == code
