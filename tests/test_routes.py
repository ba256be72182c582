"""The routes of a server: whom they answer, and what a caller may name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosched.engines.sglang.launcher import launch
from cosched.engines.sglang.operators import routes
from cosched.engines.sglang.operators.control import check
from cosched.errors import ControlError
from tests.helpers.serving import config


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "", ".hidden", "x" * 101, None, "a\n", "a b"]
)
def test_a_remote_caller_names_a_checkpoint_and_no_path(tmp_path: Path, name: str | None) -> None:
    """Who has the key of the API must not write where the server's user may."""
    with pytest.raises(ControlError, match="a NAME is letters"):
        routes.command_of("save", json.dumps({"path": name}).encode(), tmp_path)


def test_a_name_goes_below_the_checkpoints(tmp_path: Path) -> None:
    """And nowhere else."""
    command = routes.command_of("save", b'{"path": "monday-1.0"}', tmp_path)
    assert command.path == str(tmp_path / "monday-1.0")


def test_a_relative_run_folder_can_be_saved_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shipped file has one, and another process writes there: it is handed an absolute path."""
    monkeypatch.chdir(tmp_path)
    relative = config("run.dir=runs", "run.name=mine")
    folder = launch._folder_of_start(relative)
    assert folder.parent == tmp_path / "runs" / "mine"
    command = routes.command_of("save", b'{"path": "monday"}', folder / "checkpoints")
    check(command)
    assert command.path == str(folder / "checkpoints" / "monday")


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("rollback", b"{}"),
        ("rollback", b'{"version": -1}'),
        ("rollback", b'{"version": "3"}'),
        ("rollback", b'{"versions": 3}'),
        ("on", b"[]"),
        ("on", b"\xff"),
    ],
)
def test_a_body_that_is_not_as_documented_is_refused(verb: str, body: bytes) -> None:
    """Not guessed at: rolling back to a default would be a surprise."""
    with pytest.raises(ControlError, match=verb):
        routes.command_of(verb, body, Path("/x"))


@pytest.mark.parametrize(
    ("host", "headers", "answered"),
    [
        ("127.0.0.1", {}, True),
        ("127.1.2.3", {}, True),
        ("::1", {}, True),
        ("10.0.0.1", {}, False),
        ("::ffff:127.0.0.1", {}, True),
        ("::ffff:10.0.0.1", {}, False),
        ("127.0.0.1", {"host": "localhost:30000"}, True),
        ("127.0.0.1", {"host": "LOCALHOST"}, True),
        ("127.0.0.1", {"host": "127.0.0.1:30000"}, True),
        ("::1", {"host": "[::1]:30000"}, True),
        ("127.0.0.1", {"host": "evil.example:30000"}, False),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, False),
        ("127.0.0.1", {"host": "localhost.evil.example"}, False),
        ("127.0.0.1", {"host": "10.0.0.1:30000"}, False),
        ("127.0.0.1", {"host": ""}, False),
        ("", {}, False),
        ("unix", {}, False),
        ("127.0.0.1", {"origin": "http://evil.example"}, False),
        ("127.0.0.1", {"origin": "null"}, False),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, False),
    ],
)
def test_without_a_key_only_this_machine_is_answered(
    host: str, headers: dict[str, str], answered: bool
) -> None:
    """SGLang lets every web page call it, so a page open on this machine is refused as well; also one
    whose name was made to point here after it was opened (DNS rebinding), which sends no ``Origin``
    with a GET. What a proxy says of its client is anybody's word, and uvicorn may have taken it."""
    refusal = routes.refused(SimpleNamespace(host=host), {"host": "127.0.0.1:30000", **headers})
    assert (refusal is None) is answered


def test_a_connection_without_an_address_is_refused() -> None:
    """A server on a Unix socket knows no peer."""
    assert routes.refused(None, {}) is not None
