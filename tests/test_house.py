"""The house itself: what lies where, how long it is, and what imports what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cosched", "drafters", "losses", "schedulers")
MOST_LINES = 400
DOORS = {"cli", "convert_checkpoint", "doctor", "sglang_entry"}
CORE = {"coscheduler", "errors", "policies", "protocols", "records", "registry"}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


def too_long(paths: list[Path]) -> dict[str, int]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES}


def test_no_module_is_longer_than_can_be_read_at_once() -> None:
    """One that grows past this has a second subject, which wants a module of its own."""
    assert modules()
    assert too_long(modules()) == {}


def test_the_loop_is_read_without_turning_the_page() -> None:
    """What a round does is told in one module, of fewer than 200 lines."""
    assert len((ROOT / "cosched" / "coscheduler.py").read_text().splitlines()) < 200


def test_no_test_file_is_longer_than_can_be_read_at_once() -> None:
    """Nor is what tests share: it is split by subject, as the code is."""
    assert files_of_tests()
    assert too_long(files_of_tests()) == {}


def test_no_test_file_imports_another() -> None:
    """What two of them need is in a module of helpers: a file of tests can be split or renamed."""
    found = {
        (str(path.relative_to(ROOT)), name) for path in files_of_tests() for name in imports(path)
    }
    assert any(name == "tests.helpers.paths" for _, name in found)
    assert {(path, name) for path, name in found if is_test_module(name)} == set()


def imports(path: Path) -> set[str]:
    """Every module that it may import, inside functions too: of ``from a import b`` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def is_test_module(name: str) -> bool:
    package, *rest = name.split(".")
    return package == "tests" and any(p.startswith("test_") or p == "conftest" for p in rest)


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
    [
        "cosched.coscheduler",
        "cosched.registry",
        "schedulers.goodput",
        "schedulers.length",
        "schedulers.objective",
    ],
)
def test_the_loop_and_the_policies_are_imported_without_a_tensor_library(module: str) -> None:
    """They name tensors as types. import-linter counts such imports, so it cannot tell them apart."""
    code = f"import sys, {module}\nprint(*sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
