"""Weights that are damaged, missing or pickled: refused by ``check``, before anything loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosched.engines.sglang.launcher import launch
from cosched.errors import CheckpointError
from drafters.checkpoint import tensor_names
from tests.helpers.cli import run_cli
from tests.helpers.experiments import write
from tests.helpers.paths import ROOT
from tests.helpers.serving import config


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _noise(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def _pickled(path: Path) -> None:
    path.unlink()
    torch.save({}, path.with_name("model.pt"))


def _published_as_pickles(path: Path) -> None:
    path.unlink()
    torch.save({}, path.with_name("pytorch_model.bin"))


def _one_part_gone(path: Path) -> None:
    index = path.with_name("model.safetensors.index.json")
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}})
    )


SPOILED: list[tuple[Callable[[Path], None], str]] = [
    (_empty, "is empty, cut off, or no safetensors"),
    (_cut, "is damaged: it has .* and by its header"),
    (_noise, "is empty, cut off, or no safetensors"),
    (_pickled, r"has only model\.pt, which are not opened"),
    (_published_as_pickles, r"has only pytorch_model\.bin, which are not opened"),
    (_one_part_gone, r"lacks gone\.safetensors"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
@pytest.mark.parametrize("whose", ["target", "drafter"])
def test_damaged_weights_are_refused_before_sglang_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    says: str,
    whose: str,
) -> None:
    """`check` called them valid, and SGLang ended with 137 and no line of ours."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "version_of", lambda _name: "0.5.23")
    source = "tinyworld/target" if whose == "target" else "tinyworld/eagle3"
    shutil.copytree(source, tmp_path / "x")
    spoil(tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"^{whose}\.path: .*{says}"):
        launch.check_servable(config(f"{whose}.path={tmp_path / 'x'}"))


@pytest.mark.parametrize("spoil", [_empty, _cut])
def test_check_refuses_them_in_one_line(
    tmp_path: Path, settings: dict, spoil: Callable[[Path], None]
) -> None:
    """With the exit code of bad input."""
    shutil.copytree(settings["drafter"]["path"], tmp_path / "draft")
    spoil(tmp_path / "draft" / "model.safetensors")
    file = write(tmp_path, settings)
    code, _, err = run_cli("check", "-c", file, f"drafter.path={tmp_path / 'draft'}")
    assert (code, "Traceback" in err, err.count("\n")) == (2, False, 1)
    assert "drafter.path" in err
    assert run_cli("check", "-c", file)[0] == 0


def test_a_draft_of_pickled_tensors_is_read_where_we_read_it(
    tmp_path: Path, settings: dict
) -> None:
    """Without running code in it, by the embedded engine; SGLang is another matter."""
    from safetensors.torch import load_file

    shutil.copytree(settings["drafter"]["path"], tmp_path / "draft")
    weights = tmp_path / "draft" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "draft" / "pytorch_model.bin")
    weights.unlink()
    file = write(tmp_path, settings)
    assert run_cli("check", "-c", file, f"drafter.path={tmp_path / 'draft'}")[0] == 0


def test_a_draft_of_pickled_tensors_is_served_once_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SafeAILab's heads come so, which SGLang may unpickle; the message names what helps."""
    monkeypatch.chdir(ROOT)
    shutil.copytree("tinyworld/eagle3", tmp_path / "x")
    _published_as_pickles(tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match="cosched convert"):
        launch.check_servable(config(f"drafter.path={tmp_path / 'x'}"))


@pytest.mark.parametrize("zipped", [True, False])
def test_names_are_read_from_old_files_too(tmp_path: Path, zipped: bool) -> None:
    """Files of before PyTorch 1.6 cannot be mapped into memory."""
    table = {"fc.weight": torch.ones(2, 2)}
    torch.save(table, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert tensor_names(tmp_path) == {"fc.weight"}
