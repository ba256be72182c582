"""Where a trainer finds the memory of a server's rows: as between containers, which have namespaces of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import msgspec
import pytest

from cosched.sidecar.messages import Memory
from cosched.sidecar.slots import mapped
from tests.helpers.paths import ROOT

SERVER = """
import sys
import msgspec
from cosched.sidecar.slots import Slots
slots = Slots("there", 1, 100)
slots.tensors[0][:3] = 7
print(msgspec.json.encode(slots.memory).decode(), flush=True)
sys.stdin.read()
"""
OWN_PROCESSES = ("--pid", "--fork", "--mount-proc")
ALL_OTHERS = ("--mount", "--ipc", "--uts", "--net")


def can_make_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, *OWN_PROCESSES, "true"], check=False, capture_output=True).returncode  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="no right to make namespaces (or no unshare)")
@pytest.mark.parametrize(("apart", "found"), [(ALL_OTHERS, True), (OWN_PROCESSES, False)])
def test_memory_is_found_where_processes_are_seen_whatever_else_is_apart(
    apart: tuple[str, ...], found: bool
) -> None:
    """The compose file shares the namespace of processes, and nothing else, for this; in one of its own a
    server has a number that is another's here, and its rows go through the socket."""
    process = subprocess.Popen(
        ["unshare", *apart, sys.executable, "-c", SERVER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            memory = msgspec.json.decode(process.stdout.readline(), type=Memory)
            slots = mapped(memory, 1 << 20)
            assert (slots is not None) == found
            assert slots is None or slots[0][:4].tolist() == [7, 7, 7, 0]
        finally:
            process.stdin.close()  # which ends it
