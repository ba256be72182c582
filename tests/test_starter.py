"""``cosched init``: an empty folder becomes one in which the examples run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosched.settings.load import check_paths, load_config
from tests.helpers.cli import run_cli


def test_what_is_written_runs_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick start finds its model and text from there, and nothing is ever written over."""
    folder = tmp_path / "new"
    code, out, err = run_cli("init", folder)
    assert code == 0, err
    assert f"cd {folder} && cosched run -c configs/quickstart.yaml" in out
    monkeypatch.chdir(folder)
    check_paths(load_config(Path("configs/quickstart.yaml")))
    assert not Path("configs/bench").exists()  # suites name scripts that only a clone has
    kept = Path("configs/quickstart.yaml")
    kept.write_text("mine")
    code, _, err = run_cli("init")
    assert code == 1
    assert "configs is there already" in err
    assert kept.read_text() == "mine"


def test_an_installation_without_them_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from a checkout of the package alone."""
    import cosched

    monkeypatch.setattr(cosched, "__file__", str(tmp_path / "cosched" / "__init__.py"))
    code, _, err = run_cli("init", tmp_path / "new")
    assert code == 1
    assert "neither example experiments nor the tiny world" in err
