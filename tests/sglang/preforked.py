"""Processes forked from one that has imported SGLang: what tests start is there some seconds sooner.

SGLang takes longer to import than most tests take, and each server and each engine would do it anew. Only
what is imported is shared: a process gets its own variables, words and files. ``COSCHED_TEST_SPAWN=1``
asks for a process as users start it, and so does a variable that SGLang reads while it is imported.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import setproctitle  # SGLang's

from cosched.engines.sglang.cpu.environment import environment as cpu_environment
from tests.helpers.paths import ROOT

IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "cosched.engines.sglang.launcher.launch",
)
READ_AT_IMPORT = "SGLANG_TEST_"


class Process(Protocol):
    """What tests want of one, as ``subprocess.Popen`` has it."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def start(
    module: str, words: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
) -> Process:
    """``python -m module words...`` with these variables, what it prints in files, or in one."""
    out.write_bytes(b"")
    err.write_bytes(b"")
    spawn = environment.get("COSCHED_TEST_SPAWN") == "1"
    if spawn or any(name.startswith(READ_AT_IMPORT) for name in environment):
        with out.open("ab") as output, err.open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=environment, cwd=ROOT, stdout=output, stderr=errors,
            )  # fmt: skip
    _have_server()
    arguments = (module, list(words), dict(environment), str(out), str(err))
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
    process.start()
    return Forked(process)


class Forked:
    """A process of the one that forks, with the manners of ``subprocess.Popen``."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        atexit.register(self.kill)  # multiprocessing would wait for it

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _have_server() -> None:
    """The process that forks; it has the variables of a server, not those of tests."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    before = dict(os.environ)
    os.environ.pop("TRITON_INTERPRET", None)  # of this process
    os.environ.update(cpu_environment())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    module: str, words: Sequence[str], environment: Mapping[str, str], out: str, err: str
) -> None:
    """In the forked process: as if it had been started with these words."""
    for number, path in ((1, out), (2, err)):
        with Path(path).open("ab") as file:
            os.dup2(file.fileno(), number)
    missing = [name for name in IMPORTED if name not in sys.modules]
    assert not missing, f"not imported in advance: {missing}"
    # SGLang finds its schedulers by their titles, and no title can be set once the variables have moved.
    setproctitle.setproctitle(" ".join([module, *words]))
    os.environ.clear()
    os.environ.update(environment)
    paths = environment["PYTHONPATH"].split(os.pathsep)
    sys.path[:0] = [path for path in paths if path not in sys.path]
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage], which a forked process leaves out
