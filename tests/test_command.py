"""The command beside ``run``: checks, plugins, the shipped files, the process it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from cosched.errors import ConfigError, CoschedError
from cosched.settings.load import load_config, outline, resolved, to_yaml
from tests.helpers.cli import run_cli
from tests.helpers.experiments import write
from tests.helpers.paths import ROOT


def test_check_and_plugins(tmp_path: Path, settings: dict) -> None:
    code, out, _ = run_cli("check", "-c", write(tmp_path, settings), "adapt.trainer.lr=0.01")
    assert (code, "lr: 0.01" in out, "valid" in out) == (0, True, True)
    code, out, _ = run_cli("plugins")
    assert code == 0
    assert all(name in out for name in ("eagle3", "forward_kl", "never", "every_n_rounds"))


@pytest.mark.parametrize("name", ["real_model", "recipes", "never_worse"])
def test_what_check_prints_is_the_whole_configuration(tmp_path: Path, name: str) -> None:
    """Of variants and drafts it leaves out only what they share with the section adapt."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    shown = tmp_path / "shown.yaml"
    shown.write_text(outline(config), encoding="utf-8")
    assert resolved(load_config(shown)) == resolved(config)
    assert len(shown.read_text(encoding="utf-8").splitlines()) < 230


@pytest.mark.slow
def test_check_loads_no_model(tmp_path: Path, settings: dict) -> None:
    """Validation needs neither weights nor transformers."""
    program = (
        "import sys; sys.argv = ['cosched', 'check', '-c', sys.argv[1]]\n"
        "from cosched.cli import main\n"
        "main()\n"
        "assert 'transformers' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(write(tmp_path, settings))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this machine has no huge pages to give",
)
@pytest.mark.slow
def test_large_tensors_lie_in_huge_pages() -> None:
    """The command asks torch for them before the first tensor, after which nobody is heard."""
    program = (
        "from cosched import cli\n"
        "def allocate():\n"
        "    import torch\n"
        "    kept = torch.ones(2**24)\n"
        "    print(open('/proc/self/smaps_rollup').read())\n"
        "cli.app = allocate\n"
        "cli.main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("AnonHugePages")]
    assert int(line.split()[1]) > 2**15  # KiB: most of the tensor, whose ends may not be aligned


def test_another_kind_needs_no_cleaning_up(tmp_path: Path, settings: dict) -> None:
    """``adapt.policy.kind=never`` works on a file that has the old kind's fields; typos do not."""
    path = write(tmp_path, settings)
    assert load_config(path, ["adapt.policy.kind=never"]).policy_settings.kind == "never"
    with pytest.raises(ConfigError, match="rounds"):
        load_config(path, ["adapt.policy.kind=never", "adapt.policy.rounds=3"])


EXPERIMENTS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if "sweep_" not in p.stem]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_complete(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Each shipped file loads, and its resolved form loads to the same settings."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert msgspec.to_builtins(config)["run"]["name"] == path.stem
    resolved = yaml.safe_load(to_yaml(config))
    assert set(resolved) >= {"run", "engine", "target", "workload", "arms", "adapt"}
    assert "drafter" in resolved or resolved["drafts"]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_yaml(load_config(tmp_path / "config.yaml")) == to_yaml(config)


def test_errors_are_also_the_builtins_they_refine() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CoschedError)
