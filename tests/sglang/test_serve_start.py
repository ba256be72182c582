"""What keeps a server from starting, and what SGLang's own parser makes of its arguments."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosched.engines.sglang import compat
from cosched.engines.sglang.launcher.arguments import command_line
from cosched.errors import ConfigError
from cosched.settings.load import load_config
from tests.sglang.server import CONFIG, PATIENCE
from tests.sglang.serving import ROOT

pytestmark = pytest.mark.sglang


BROKEN = """
import sys
from pathlib import Path
from cosched import cli
from cosched.engines.sglang.launcher.run_directory import RunDirectory
{patch}
if __name__ == "__main__":
    sys.argv = ["cosched", "serve", "-c", "configs/serve_tiny_cpu.yaml", *sys.argv[1:]]
    cli.main()
"""
UNREADABLE = """
create = RunDirectory.create
def broken(text):
    made = create(text)
    made.config.write_text("run: [")
    return made
RunDirectory.create = broken
"""
SILENT = "RunDirectory.report = lambda *_: None  # also in the processes that are spawned"


@pytest.mark.parametrize(
    ("patch", "variables", "message"),
    [
        (UNREADABLE, {}, r"cosched: the server cannot start: .*config\.yaml is not YAML"),
        (SILENT, {}, "cosched: .*no adapting worker reported from rank 0 of 1"),
        ("", {"SGLANG_PLUGINS": "cosched_cpu"}, "cosched: .*has not taken up cosched's plugin"),
    ],
    ids=["unreadable", "silent", "not-loaded"],
)
def test_a_server_that_would_not_adapt_does_not_start(
    tmp_path: Path,
    bare_environment: dict[str, str],
    patch: str,
    variables: dict[str, str],
    message: str,
) -> None:
    """The last words say why, the exit code is that of bad settings, nothing is left running."""
    script = tmp_path / "serve.py"
    script.write_text(BROKEN.format(patch=patch))
    process = subprocess.run(
        [sys.executable, str(script), f"run.dir={tmp_path / 'runs'}"],
        env={**bare_environment, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 2, process.stderr[-8000:]
    assert re.search(message, process.stderr[-600:]), process.stderr[-8000:]
    assert "Uvicorn running" not in process.stderr


@pytest.mark.parametrize(
    ("override", "words", "message"),
    [
        ("run.name=x", ["--model", "x"], r"--model-path: 'x' contradicts target\.path"),
        (
            "run.name=x",
            ["--tensor-parallel-size", "2", "--dp", "2"],
            "--dp-size: each of 2 replicas would learn",
        ),
        ("engine.arguments.max_total_token=1", [], "did you mean max_total_tokens"),
        ("engine.arguments.model_path=x", [], r"contradicts target\.path"),
    ],
)
def test_sglangs_own_parser_is_asked(override: str, words: list[str], message: str) -> None:
    """Its short names and aliases are seen through, and its real names are offered."""
    parser = argparse.ArgumentParser()
    compat.ServerArgs.add_cli_args(parser)
    config = load_config(ROOT / CONFIG, [override])
    with pytest.raises(ConfigError, match=message):
        command_line(config, words, parser)


def test_what_is_passed_on_is_what_sglang_reads() -> None:
    """All of the line that we make, by its real parser."""
    parser = argparse.ArgumentParser()
    compat.ServerArgs.add_cli_args(parser)
    config = load_config(ROOT / CONFIG, ["drafter.window=96", "engine.arguments.tp_size=2"])
    read = parser.parse_args(command_line(config, ["--api-key", "k"], parser))
    assert read.speculative_draft_window_size == 96
    assert (read.tp_size, read.api_key, read.max_running_requests) == (2, "k", 4)


def test_the_names_that_the_launcher_uses_are_sglangs() -> None:
    """They are resolved when first used, in the middle of a start."""
    for name in compat._PATHS:
        assert getattr(compat, name) is not None
