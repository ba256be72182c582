"""The house itself: what lies where, how long it is, and what it needs to be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cosched", "drafters", "losses", "schedulers")
MOST_LINES = 400
DOORS = {"cli", "convert_checkpoint", "doctor", "sglang_entry"}
CORE = {"coscheduler", "errors", "protocols", "records", "registry"}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_module_is_longer_than_can_be_read_at_once() -> None:
    """One that grows past this has a second subject, which wants a module of its own."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert lengths
    assert {path.name: n for path, n in lengths.items() if n > MOST_LINES} == {}


def test_beside_the_folders_lie_only_the_doors_and_the_core() -> None:
    """The listing of ``cosched/`` alone is to tell where a thing is."""
    found = {path.stem for path in (ROOT / "cosched").glob("*.py")}
    assert found == DOORS | CORE | {"__init__"}


def test_every_folder_says_what_it_is() -> None:
    """The list of modules in the documentation begins each folder with that line."""
    folders = {path.parent for path in modules() if "stand_ins" not in path.parts}
    for folder in folders:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), folder


@pytest.mark.parametrize(
    "module",
    ["cosched.coscheduler", "cosched.registry", "schedulers.goodput", "schedulers.objective"],
)
def test_the_loop_and_the_policies_are_imported_without_a_tensor_library(module: str) -> None:
    """They name tensors as types. import-linter counts such imports, so it cannot tell them apart."""
    code = f"import sys, {module}\nprint(*sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
