"""Names and numbers beyond all bounds, and files that are none: one line from ``check``, with the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.cli import run_cli
from tests.helpers.experiments import write


def refused(tmp_path: Path, settings: dict, *words: str) -> str:
    """What ``check`` says: one line, exit code 2."""
    code, out, err = run_cli("check", "-c", write(tmp_path, settings), *words)
    assert (code, "valid" in out, "Traceback" in err, err.count("\n")) == (2, False, False, 1), err
    return err


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "-x", "x" * 101, "/tmp/x"])
def test_a_run_writes_below_its_folder(tmp_path: Path, settings: dict, name: str) -> None:
    """`run.name: ../x` wrote beside the folder of all runs."""
    settings["run"]["name"] = name
    assert "run.name: a folder of that name is made in run.dir" in refused(tmp_path, settings)


def test_the_folder_of_runs_has_a_name(tmp_path: Path, settings: dict) -> None:
    assert "run.dir: the folder that runs go into, got ''" in refused(
        tmp_path, settings, "run.dir=''"
    )


@pytest.mark.parametrize("device", ["tpu", "gpu", "cuda:x", "cuda:", "CPU", ""])
def test_a_device_is_one_that_there_is(tmp_path: Path, settings: dict, device: str) -> None:
    """An unknown one was torch's to refuse, in a traceback."""
    settings["engine"]["device"] = device
    assert "engine.device: auto, cpu, cuda or cuda:N is allowed" in refused(tmp_path, settings)


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1")])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch, count: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    settings["engine"]["device"] = device
    assert f"engine.device: '{device}', and torch sees" in refused(tmp_path, settings)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("adapt.policy.rounds=99999999999999999999999999", "adapt.policy.rounds: an integer of at most"),
        ("adapt.memory.max_tokens=9223372036854775807", "adapt.memory.max_tokens: an integer of at"),
        ("adapt.memory.max_bytes=9223372036854775807", "adapt.memory.max_bytes: an integer of at"),
        ("run.seed=-1", "run.seed: Expected `int` >= 0, got -1"),
        ("engine.max_batch=99999999999", "engine.max_batch: an integer of at most"),
        ("engine.max_batch=5000", "engine.max_batch: Expected `int` <= 4096, got 5000"),
        ("workload.max_new_tokens=100000", "workload.max_new_tokens: 100000 and a prompt do not fit"),
    ],
)  # fmt: skip
def test_a_number_beyond_all_bounds_is_refused(
    tmp_path: Path, settings: dict, word: str, says: str
) -> None:
    """`check` called them valid, and found that 53,644 TiB would be needed."""
    settings["adapt"]["policy"] = {"kind": "every_n_rounds", "rounds": 8}
    assert says in refused(tmp_path, settings, word)


def test_bytes_may_be_more_than_any_count(tmp_path: Path, settings: dict) -> None:
    """Sixteen GiB for the replay buffer is a sound setting."""
    words = [f"adapt.memory.max_bytes={2**34}", f"engine.arguments={{max_total_tokens: {2**40}}}"]
    code, _, err = run_cli("check", "-c", write(tmp_path, settings), *words)
    assert code == 0, err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "nothing is in it"),
        (b"# only words\n", "nothing is in it"),
        (b"- a\n- b\n", "expected sections"),
        (bytes(range(128, 256)), "is no text: byte 0 of it is not UTF-8"),
        (b"a\0b", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    """A library's own words were shown, or a key that the file has no room for."""
    (tmp_path / "x.yaml").write_bytes(content)
    code, _, err = run_cli("check", "-c", tmp_path / "x.yaml")
    assert (code, says in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${foo", "run.name: a reference is written ${section.key}, and this one is not whole"),
        ("${no.such}", "run.name: it refers to 'no.such', and there is no such key"),
        ("${oc.env:COSCHED_NOT_SET}", "run.name: the environment variable COSCHED_NOT_SET is not set"),
        ("???", "run.name: Missing mandatory value"),
    ],
)  # fmt: skip
def test_a_reference_that_leads_nowhere_is_named_with_its_key(
    tmp_path: Path, settings: dict, value: str, says: str
) -> None:
    settings["run"]["name"] = value
    assert says in refused(tmp_path, settings)


@pytest.mark.parametrize("key", ["adapt", "adapt.policy", "adapt.trainer", "engine"])
def test_a_list_in_the_place_of_a_section_is_named(
    tmp_path: Path, settings: dict, key: str
) -> None:
    """`adapt=[]` was answered with "Index 'policy' (str) is not an int"."""
    settings["adapt"] = {**settings.get("adapt", {}), "policy": {"kind": "never"}, "trainer": {}}
    assert f"{key}: expected a section, {{key: value, …}}, got []" in refused(
        tmp_path, settings, f"{key}=[]"
    )


def test_a_list_in_the_file_is_named_whatever_is_laid_over_it(
    tmp_path: Path, settings: dict
) -> None:
    settings["adapt"] = []
    assert "adapt: " in refused(tmp_path, settings)
    assert "adapt: expected a section" in refused(tmp_path, settings, "adapt.trainer.lr=1e-4")
