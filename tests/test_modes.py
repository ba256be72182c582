"""Modes of SGLang's that cannot be adapted in, an address that is taken, and what a mistake prints."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from cosched.engines.sglang.launcher.admission import check_address, check_tokens
from cosched.engines.sglang.launcher.arguments import Parser
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.engines.sglang.launcher.run_directory import RunDirectory
from cosched.engines.sglang.worker.supported import MODES, check_resolved
from cosched.errors import ConfigError, ServerError
from tests.helpers.cli import run_cli
from tests.helpers.paths import ROOT
from tests.helpers.serving import TINY, config

REFUSED: list[tuple[str, Any]] = [
    ("enable_layernorm_sp", True),
    ("disaggregation_mode", "prefill"),
    ("enable_torch_compile", True),
    ("enable_memory_saver", True),
    ("speculative_adaptive", True),
    ("speculative_accept_threshold_single", 0.9),
    ("speculative_accept_threshold_acc", 0.9),
    ("speculative_use_block_verification", True),
    ("enable_dp_attention", True),
    ("pp_size", 2),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_mode_that_cannot_be_adapted_in_is_refused_by_check(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """Without SGLang, and by the name that was written; the tap would have seen shards, or nothing."""
    monkeypatch.chdir(ROOT)
    word = f"engine.arguments.{name}={value}"
    code, _, err = run_cli("check", "-c", TINY, word)
    assert (code, err.count("\n")) == (2, 1)
    assert f"engine.arguments.{name}: cosched serves with {MODES[name][0]!r} only" in err
    with pytest.raises(ConfigError, match=rf"^engine\.arguments\.{name}: "):
        check_servable(config(word))


def test_what_sglang_resolved_is_what_counts() -> None:
    """From 0.5.22 on ``--dp-size 2 --enable-dp-attention`` comes out as ``attn_dp_size=2``, with the
    other two as if they had not been given."""
    resolved = SimpleNamespace(dp_size=1, enable_dp_attention=False, attn_dp_size=2, pp_size=1)
    with pytest.raises(ConfigError, match=r"^--attn-dp-size: cosched serves with 1 only, got 2"):
        check_resolved(resolved)
    resolved.attn_dp_size = 1
    check_resolved(resolved)


def test_a_mistyped_argument_is_one_line_with_what_was_meant() -> None:
    """SGLang's parser printed 226 lines of usage before it."""
    parser = Parser()
    for name in ("--model-path", "--port", "--enable-metrics", "--max-total-tokens"):
        parser.add_argument(name)
    with pytest.raises(ConfigError) as error:
        parser.parse_args(["--max-totl-tokens", "5"])
    (line,) = str(error.value).splitlines()
    assert "--max-totl-tokens" in line
    assert "did you mean --max-total-tokens" in line


def test_a_taken_address_is_found_before_anything_is_loaded() -> None:
    """It took 79 seconds, and ended in "The server is fired up and ready to roll!"."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"--port {port}: .*use another --port") as error:
            check_address("127.0.0.1", port)
        assert error.value.exit_code == 1
    check_address("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"--host 203\.0\.113\.1 "):
        check_address("203.0.113.1", port)


@pytest.mark.parametrize("token", [-1, 512, 2**31])
def test_a_token_that_does_not_exist_is_refused_in_front(token: int) -> None:
    """One request with one of them ended the server, for everybody."""
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=512))
    for fine in ([0, 511], [], None):
        check_tokens(manager, None, fine)
    with pytest.raises(ValueError, match=f"there is no token {token}; the vocabulary has 512"):
        check_tokens(manager, None, [3, token, 4])


def test_the_folder_of_a_launcher_that_was_killed_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the socket in it; that of a launcher that lives stays, and so does anything else."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive, killed = (RunDirectory.create("run: {name: x}") for _ in range(2))
    other = tmp_path / "cosched-of-somebody"
    other.mkdir()
    assert killed._lock is not None
    killed._lock.close()  # as the system does for a process that is gone
    third = RunDirectory.create("run: {name: x}")
    assert {path.name for path in tmp_path.iterdir()} == {
        alive.path.name, third.path.name, other.name
    }  # fmt: skip
    for directory in (alive, third):
        directory.remove()
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_memory_that_sglang_shares_goes_with_the_folder(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang leaves a segment of /dev/shm with every start. What is not its own stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    number = uuid4().hex
    others, loads = (Path(f"/dev/shm/{name}_{number}") for name in ("others", "sglang_loads"))
    with ExitStack() as stack:
        for path in (others, loads):
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(b"x")
            with path.open("r+b") as file:
                stack.enter_context(mmap(file.fileno(), 1))
        directory = RunDirectory.create("run: {name: x}")
        directory.report(0, "COSCHED_EAGLE3")
        directory.note_shared()
        if killed:
            assert directory._lock is not None
            directory._lock.close()
            directory = RunDirectory.create("run: {name: x}")
        directory.remove()
        assert others.exists()
        assert not loads.exists()
