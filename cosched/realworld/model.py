"""A GGUF file or a Hugging Face folder as the Hugging Face folder that everything here works with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from cosched.errors import RealWorldError
from cosched.realworld.borrowing import sha256_of_tensor
from cosched.realworld.folders import sealed_folder
from cosched.realworld.pins import IDENTITY, SHAPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours, the file's
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError)  # whatever is damaged


def fits(source: Path) -> bool:
    """Whether the model of a GGUF file or a folder has the shape that the drafts are made for.

    Raises:
        RealWorldError: it cannot be read.
    """
    try:
        if source.is_dir():
            config = AutoConfig.from_pretrained(source, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(
                source.parent, gguf_file=source.name, local_files_only=True
            )
    except UNREADABLE as error:
        raise RealWorldError(f"{source} cannot be read: {error}") from error
    return all(getattr(config, key, None) == value for key, value in SHAPE.items())


def convert(
    source: Path, destination: Path, about: Callable[[str], str], licence: Path | None = None
) -> None:
    """Write the folder of a GGUF file or of another Hugging Face folder, whole or not at all.

    It has bfloat16 weights (a GGUF file's as they are dequantised: nothing is claimed of what they
    were before), a tokenizer with a pad token, and the end tokens in ``generation_config.json``.
    ``WEIGHTS_SHA256`` has their checksum, from which ``about`` makes the ``README.md``.

    Raises:
        RealWorldError: the source cannot be read, or the folder not be written.
    """
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():  # DeepSpeed is imported to save a model, and would warn of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        model, tokenizer = _from_folder(source) if source.is_dir() else _from_gguf(source)
    except UNREADABLE as error:
        raise RealWorldError(f"{source} cannot be read: {error}") from error
    with sealed_folder(destination) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = weights_sha256(folder)
        (folder / IDENTITY).write_text(weights + "\n", encoding="utf-8")
        (folder / "README.md").write_text(about(weights), encoding="utf-8")
        if licence is not None and licence.is_file():
            shutil.copyfile(licence, folder / "LICENSE")


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the names and checksums of all tensors, by name.

    Raises:
        RealWorldError: the folder's weights cannot be read.
    """
    sums: dict[str, str] = {}
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as opened:
                names = opened.keys()
                sums |= {name: sha256_of_tensor(opened.get_tensor(name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise RealWorldError(f"{folder} cannot be read: {error}") from error
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> str:
    """What a GGUF file was read with."""
    packages = ("transformers", "gguf")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _from_folder(source: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, local_files_only=True
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def _from_gguf(source: Path) -> tuple[Any, Any]:
    fields, here = _fields(source), {"gguf_file": source.name, "local_files_only": True}
    wide = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **here)
    model = wide.bfloat16()
    tokenizer = _tokenizer(AutoTokenizer.from_pretrained(source.parent, **here), fields)
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot")]
    ends = {int(fields[key]) for key in keys if key in fields}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer


def _fields(source: Path) -> dict[str, Any]:
    """What the file says of its tokenizer, but for the vocabulary itself."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    long = ("tokens", "token_type", "scores", "merges")
    return {
        name: field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.") and not name.endswith(long)
    } | {"length": next(f.contents() for n, f in fields.items() if n.endswith(".context_length"))}


def _tokenizer(read: Any, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """What transformers reads, with the file's own special tokens, template and length.

    transformers takes the special tokens by their usual names, so that here the start token would
    end a text; and of a byte-level vocabulary it does not read how text is cut before merging.
    """
    backend = read.backend_tokenizer
    if fields.get("tokenizer.ggml.pre") == "smollm":
        backend = _cut_as_smollm(backend)
    ids = {role: fields.get(f"tokenizer.ggml.{theirs}_token_id") for role, theirs in ROLES.items()}
    if ids["pad"] is None:
        ids["pad"] = ids["eos"]
    special = {f"{r}_token": backend.id_to_token(i) for r, i in ids.items() if i is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _cut_as_smollm(backend: Tokenizer) -> Tokenizer:
    """Every digit by itself, then as GPT-2; bytes need no token for what is unknown."""
    plan = json.loads(backend.to_str())
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    cut = [digits, {**bytes_, "use_regex": True}]
    plan["normalizer"] = plan["post_processor"] = None
    plan["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cut}
    plan["decoder"] = {**bytes_, "add_prefix_space": True, "use_regex": True}
    plan["model"] |= {"unk_token": None, "byte_fallback": False, "fuse_unk": False}
    return Tokenizer.from_str(json.dumps(plan))
