"""SGLang's environment, in this process and in those that tests start."""

from __future__ import annotations

import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cosched.engines.sglang.cpu.environment import environment, install_stand_ins

if TYPE_CHECKING:
    from tests.sglang.adapting import Serve
    from tests.sglang.server import Start
    from tests.sglang.serving import Decode

ROOT = Path(__file__).resolve().parents[2]

os.environ.update(
    {name: value for name, value in environment().items() if name != "PYTHONPATH"},
    TRITON_INTERPRET="1",  # in this process Triton kernels run as Python
    THP_MEM_ALLOC_ENABLE="1",  # as the command does
)
install_stand_ins()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("sglang") is None:
        for item in items:
            if item.get_closest_marker("sglang"):
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed"))


@pytest.fixture(scope="session")
def server_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that serves: as the product makes it, cosched found as if it were installed."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "cosched-0.dist-info"
    metadata.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["[sglang.srt.plugins]"]
    for name, target in project["entry-points"]["sglang.srt.plugins"].items():
        lines.append(f"{name} = {target}")
    lines.append("forked = tests.sglang.forked:install")
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cosched\nVersion: 0\n")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ours = environment()
    paths = [str(ROOT), str(site), ours["PYTHONPATH"]]
    return {**inherited, **ours, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def bare_environment(server_environment: dict[str, str]) -> dict[str, str]:
    """As a user's shell has it: cosched installed, nothing prepared for a CPU."""
    kept = {n: v for n, v in server_environment.items() if n not in environment()}
    paths = server_environment["PYTHONPATH"].split(os.pathsep)
    return {**kept, "PYTHONPATH": os.pathsep.join(paths[:2]), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def start(
    bare_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Starts servers; what a test leaves running is stopped at its end."""
    with starting(bare_environment, tmp_path_factory) as run:
        yield run


@pytest.fixture(scope="module")
def start_shared(
    bare_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Starts servers that all tests of a file may ask."""
    with starting(bare_environment, tmp_path_factory) as run:
        yield run


@contextmanager
def starting(environment: dict[str, str], folders: pytest.TempPathFactory) -> Iterator[Start]:
    from tests.sglang.server import CONFIG, Server, launch  # after the environment above is set

    servers: list[Server] = []

    def run(*words: str, config: str = CONFIG, **variables: str) -> Server:
        folder = folders.mktemp("server")
        servers.append(launch(config, words, folder, {**environment, **variables}))
        servers[-1].wait()
        return servers[-1]

    yield run
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def decode(server_environment: dict[str, str]) -> Decode:
    from tests.sglang.serving import Decode  # after the environment above is set

    return Decode(server_environment)


@pytest.fixture(scope="session")
def serve(decode: Decode, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    from tests.sglang.adapting import Serve  # after the environment above is set

    site = tmp_path_factory.mktemp("faults") / "faults-0.dist-info"
    site.mkdir()
    plugin = "[sglang.srt.plugins]\nfaults = tests.sglang.faults:install\n"
    (site / "entry_points.txt").write_text(plugin)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: faults\nVersion: 0\n")
    return Serve(decode, tmp_path_factory, site.parent)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Show a measured figure among the results of a passing test."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}\n")

    return show
