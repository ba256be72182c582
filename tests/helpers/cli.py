"""The command, in this process and in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys

from rich.console import Console

from cosched import cli
from tests.helpers.paths import ROOT


def run_cli(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    old = sys.argv, cli.console, cli.errors
    sys.argv = ["cosched", *map(str, arguments)]
    cli.console, cli.errors = Console(file=out, width=200), Console(file=err, width=200)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv, cli.console, cli.errors = old
    return code, out.getvalue(), err.getvalue()


def cosched_process(arguments: list[str], preexec_fn=None, **variables) -> subprocess.Popen:
    """The command as a user types it, on one thread, with these environment variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "cosched.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def heed_ctrl_c() -> None:
    """In a new process, as a shell's foreground job does: those of a script's ``&`` ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
