"""Stand-ins and plugin do nothing where they have no business; processes of their own show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCH = "SGLANG_USE_CPU_ENGINE"


def run(code: str, *paths: Path | str, **variables: str) -> str:
    """What a fresh process prints that has only these paths beside cosched's."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in (SWITCH, "PYTHONPATH")
    }
    search = os.pathsep.join([*map(str, paths), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": search, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def package(folder: Path, name: str, code: str) -> Path:
    """A package of this name in a folder for the search path."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder


ABSENT = "import importlib.util; print(importlib.util.find_spec('sgl_kernel'))"


@pytest.mark.parametrize("value", [None, "0", "", "true"])
def test_without_the_switch_nothing_is_stood_in_for(value: str | None) -> None:
    """On a GPU machine a missing sgl_kernel must stay an error and not become slow PyTorch."""
    code = (
        "import sys; before = list(sys.path)\n"
        "from cosched.engines.sglang.cpu.environment import install_stand_ins\n"
        f"install_stand_ins(); assert sys.path == before\n{ABSENT}"
    )
    assert run(code, **({} if value is None else {SWITCH: value})) == "None"


@pytest.mark.parametrize(
    ("switch", "cuda"), [("0", False), ("0", True), ("1", True)], ids=["off", "off-cuda", "cuda"]
)
def test_the_plugin_is_inert_off_the_cpu(switch: str, cuda: bool) -> None:
    """It is loaded in every process of every SGLang that finds cosched installed."""
    code = (
        "import sys\n"
        f"if {cuda}:\n"
        "    import torch; torch.cuda.is_available = lambda: True\n"
        "    record_stream = torch.Tensor.record_stream\n"
        "from cosched.engines.sglang.cpu.plugin import register\n"
        "register()\n"
        f"assert not {cuda} or torch.Tensor.record_stream is record_stream\n"
        "print(sorted({'torch', 'sglang', 'sgl_kernel'} & set(sys.modules)))"
    )
    assert run(code, **{SWITCH: switch}) == ("['torch']" if cuda else "[]")


def test_a_real_package_goes_first(tmp_path: Path) -> None:
    """PYTHONPATH comes before what is installed, so a stand-in may not be offered beside it."""
    real = package(tmp_path, "torchvision", "real = True")
    code = (
        "from cosched.engines.sglang.cpu.environment import environment, install_stand_ins\n"
        "install_stand_ins()\n"
        "import torchvision, sgl_kernel; assert torchvision.real\n"
        "print('torchvision' in environment()['PYTHONPATH'], sgl_kernel.__file__)"
    )
    offered, _, file = run(code, real, **{SWITCH: "1"}).partition(" ")
    assert offered == "False"
    assert "stand_ins" in file


def test_a_real_package_that_is_broken_is_an_error(tmp_path: Path) -> None:
    """Replacing it in silence would hide that the environment is not what its owner thinks."""
    broken = package(tmp_path, "torchvision", "raise RuntimeError('operator nms does not exist')")
    code = (
        "from cosched.engines.sglang.cpu.environment import environment\n"
        "from cosched.errors import ConfigError\n"
        "try:\n    environment()\nexcept ConfigError as error:\n    print(error)"
    )
    message = run(code, broken)
    assert str(broken) in message
    assert "operator nms does not exist" in message
    assert "pip uninstall torchvision" in message


def test_spawned_processes_find_the_stand_ins(tmp_path: Path) -> None:
    """SGLang spawns its scheduler, which imports sgl_kernel before any of our code runs."""
    code = tmp_path / "main.py"
    code.write_text(
        "import multiprocessing, importlib\n"
        "if __name__ == '__main__':\n"
        "    from cosched.engines.sglang.cpu.environment import install_stand_ins\n"
        "    install_stand_ins()\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(importlib.import_module, []), end='')\n"
        "        print(pool.apply(eval, (\"__import__('sgl_kernel').__file__\",)))\n"
    )
    printed = run(
        f"import runpy; runpy.run_path({str(code)!r}, run_name='__main__')", **{SWITCH: "1"}
    )
    assert "stand_ins" in printed


def test_the_environment_is_its_own_fixed_point() -> None:
    """A server that starts another hands the stand-ins on, and offers none as the real package."""
    code = (
        "import os\n"
        "from cosched.engines.sglang.cpu.environment import environment\n"
        "first = environment(); os.environ.update(first)\n"
        "import sys; sys.path[:0] = first['PYTHONPATH'].split(os.pathsep)\n"
        "import sgl_kernel\n"
        "second = environment()\n"
        "print(set(first['PYTHONPATH'].split(os.pathsep)) == set(second['PYTHONPATH'].split(os.pathsep)))"
    )
    assert run(code) == "True"


def test_a_stand_in_says_what_it_is(server_environment: dict[str, str]) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from torchvision.io import decode_image; decode_image(b'')"],
        env=server_environment,
        capture_output=True,
        text=True,
    )
    assert "NotImplementedError" in process.stderr
    assert "stand-in for text" in process.stderr


@pytest.mark.sglang
def test_the_plugin_takes_hold(server_environment: dict[str, str]) -> None:
    """SGLang only logs a plugin that raises, and skips a hook whose target has moved."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from cosched.engines.sglang.cpu import attention, compat\n"
        "assert compat.ATTENTION_BACKENDS['torch_native'] is attention.NativeBackend\n"
        "import pkgutil, sys\n"
        "for path in (compat.CREATE_DRAFT_BACKEND, compat.DFLASH_ARGUMENTS, compat.DFLASH_ATTENTION,\n"
        "             compat.EAGLE_SAMPLE):\n"
        "    assert hasattr(pkgutil.resolve_name(path), '__wrapped__'), path\n"
        "from cosched.engines.sglang.cpu import sampling\n"
        "ours = sampling.tree_speculative_sampling_target_only\n"
        "assert compat.dflash_utils.tree_speculative_sampling_target_only is ours\n"
        "assert compat.dflash_utils.is_dflash_sampling_verify_available()\n"
        "print('held')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=server_environment, capture_output=True, text=True
    )
    assert process.stdout.strip().endswith("held"), process.stderr[-4000:]
