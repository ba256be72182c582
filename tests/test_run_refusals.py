"""What stops a run: settings, files, folders and disks; always one message that says what."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.cli import cosched_process, run_cli
from tests.helpers.experiments import write


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapt.trainer.zero_stagee=1", ("adapt.trainer", "zero_stagee", "zero_stage")),
        ("adapt.trainer.zero_stage=3", ("adapt.trainer.zero_stage", "3", "0, 1, 2")),
        ("adapt.scope.state=forever", ("adapt.scope.state", "forever", "per_request")),
        ("engine.kind=vllm", ("engine.kind", "vllm", "embedded, sglang, trace")),
        ("adapt.loss.rows=some", ("adapt.loss.rows", "some", "accepted, all, delayed, refused")),
        ("adapt.guard.kind=bouncer", ("adapt.guard.kind", "bouncer", "finite, shadow")),
        ("adapt.trainer.lr=fast", ("adapt.trainer.lr", "float", "fast")),
        ("adapt.trainer.lr=-1", ("adapt.trainer.lr", "-1")),
        ("adapt.trainer.lr=.inf", ("adapt.trainer.lr", "finite", "inf")),
        ("adapt.policy.kind=someday", ("adapt.policy.kind", "someday", "every_n_rounds")),
        ("adapt.policy.round=3", ("adapt.policy", "round", "rounds")),
        ("adapt.loss.kind=nonsense", ("adapt.loss.kind", "nonsense", "forward_kl")),
        ("adapt.loss.position_decay=0", ("adapt.loss.position_decay", "0")),
        ("drafter.kind=eagle9", ("drafter.kind", "eagle9", "eagle3")),
        ("adapt.policy.kind=3", ("adapt.policy.kind", "got 3", "every_n_rounds")),
        ("arms=[plain,3]", ("arms[1]", "got 3")),
        ("adapt.scope.kind=toes", ("adapt.scope.kind", "toes", "body")),
        ("arms=[plain,warm]", ("arms", "warm", "frozen")),
        ("arms=[]", ("arms",)),
        ("drafter.window=null", ("drafter.window",)),
        ("engine.kind=trace", ("engine.trace",)),
        ("engine.device=abacus", ("engine.device", "abacus")),
        ("workload.documents=x.jsonl", ("workload",)),
        ("workload.prompts=missing.jsonl", ("workload.prompts", "missing.jsonl")),
        ("target.path=nowhere", ("target.path", "nowhere")),
        ("drafter.path=nowhere", ("drafter.path", "nowhere")),
        ("workload.max_new_tokens=5000", ("max_new_tokens", "4096")),
        ("adapt.replay.window=3", ("adapt.replay.window", "3")),
        ("adapt.memory.max_tokens=31", ("adapt.memory.max_tokens", "31")),
        ("adapt.memory.max_bytes=1000", ("adapt.memory.max_bytes", "1000", "window = 32")),
        ("adapt.replay.max_bytes=1000", ("adapt.replay", "use adapt.memory.max_bytes instead")),
        ("adapt.replay.max_tokens=64", ("adapt.replay", "use adapt.memory.max_tokens instead")),
        ("adapt.loss.chunk_rows=8", ("adapt.loss", "use adapt.memory.chunk_rows instead")),
        ("engine.max_batch=two", ("engine.max_batch", "two")),
        ("nonsense", ("key.sub=value", "nonsense")),
    ],
)
def test_bad_settings_are_one_clear_message(
    tmp_path: Path, settings: dict, override: str, says: tuple[str, ...]
) -> None:
    """The message names the key, what came and what is allowed; exit code 2; no folder is left."""
    code, _, err = run_cli("run", "-c", write(tmp_path, settings), override)
    assert code == 2
    assert all(word in err for word in says), err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: }")
    code, _, err = run_cli("check", "-c", tmp_path / "bad.yaml")
    assert (code, "bad.yaml" in err, "Traceback" in err) == (2, True, False)
    code, _, err = run_cli("check", "-c", tmp_path / "none.yaml")
    assert (code, "none.yaml" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompt"),
        ("{not json}\n", "line 1"),
        ('{"id": 1}\n', "text"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "twice"),
    ],
)
def test_bad_prompts(tmp_path: Path, settings: dict, content: str, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    settings["workload"]["prompts"] = str(path)
    code, _, err = run_cli("run", "-c", write(tmp_path, settings))
    assert (code, says in err, "Traceback" in err) == (2, True, False), err


def test_a_draft_for_another_target(tmp_path: Path, settings: dict, tinyworld: Path) -> None:
    """Wrong vocabulary, wrong width, a missing and a damaged tensor: each is named."""
    from safetensors.torch import load_file, save_file

    source = tinyworld / "eagle3"
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    spoiled = {
        "vocab_size 999": ({**config, "vocab_size": 999}, tensors),
        "hidden_size 96": ({**config, "hidden_size": 96}, tensors),
        "missing": (config, {n: t for n, t in tensors.items() if n != "fc.weight"}),
        "extra.weight": (config, {**tensors, "extra.weight": tensors["norm.weight"].clone()}),
        "norm_output": ({**config, "norm_output": True}, tensors),
        "hidden_size": ({k: v for k, v in config.items() if k != "hidden_size"}, tensors),
    }
    for number, (says, (new_config, new_tensors)) in enumerate(spoiled.items()):
        folder = tmp_path / f"draft{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(new_config))
        save_file(new_tensors, folder / "model.safetensors")
        settings["drafter"]["path"] = str(folder)
        code, _, err = run_cli("run", "-c", write(tmp_path, settings), f"run.name=bad{number}")
        assert (code, "Traceback" in err) == (2, False)
        assert says in err, err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    code, _, err = run_cli("run", "-c", write(tmp_path, settings), "run.name=cut")
    assert (code, "model.safetensors" in err) == (2, True)


def test_an_existing_run_is_kept(tmp_path: Path, settings: dict) -> None:
    """A second run into the same folder is refused, and the first stays; --overwrite replaces."""
    settings["arms"] = ["plain"]
    settings["workload"] |= {"max_new_tokens": 4, "max_prompts": 1}
    path = write(tmp_path, settings)
    assert run_cli("run", "-c", path)[0] == 0
    before = (tmp_path / "runs" / "one" / "summary.json").read_bytes()
    code, _, err = run_cli("run", "-c", path)
    assert (code, "--overwrite" in err) == (1, True)
    assert (tmp_path / "runs" / "one" / "summary.json").read_bytes() == before
    assert run_cli("run", "-c", path, "--overwrite")[0] == 0
    stranger = tmp_path / "runs" / "mine"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("do not delete")
    code, _, err = run_cli("run", "-c", path, "--overwrite", "run.name=mine")
    assert (code, (stranger / "thesis.txt").exists()) == (1, True)


def test_a_folder_that_cannot_be_made(tmp_path: Path, settings: dict) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run_cli(
        "run", "-c", write(tmp_path, settings), f"run.dir={tmp_path / 'file' / 'runs'}"
    )
    assert (code, "file/runs" in err, "Traceback" in err) == (1, True, False), err


@pytest.mark.slow
@pytest.mark.long
def test_a_full_disk_is_one_message(tmp_path: Path, settings: dict) -> None:
    """When no byte more can be written the run ends with a message that names the file."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    settings["arms"] = ["plain", "frozen"]
    process = cosched_process(["run", "-c", str(write(tmp_path, settings))], preexec_fn=small_files)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "cannot be written" in err
    assert "Traceback" not in err


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """The kernel's refusal is one message that names the folder."""
    tmp_path.chmod(0o555)
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)  # root may write anywhere: go to the file system as nobody
    try:
        with pytest.raises(RunFolderError, match=r"runs/one cannot be written: Permission denied"):
            RunFolder(tmp_path / "runs" / "one").create()
    finally:
        libc.setfsuid(os.geteuid())
        tmp_path.chmod(0o755)
