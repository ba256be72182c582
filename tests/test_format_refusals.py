"""Checkpoints that are damaged, ambiguous or another model's are refused with what is wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.convert_checkpoint import convert, family_of
from cosched.engines.embedded.target import Target
from cosched.registry import DRAFTERS
from drafters.checkpoint import read_tensors
from tests.helpers.checkpoints import FAMILIES, change, load, read, refused, save
from tests.helpers.paths import TINYWORLD

BAD_CONFIGS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("eagle3", {"hidden_size": 64}, ("hidden_size 64", "has 32", "another target")),
    ("eagle3", {"vocab_size": 32}, ("vocab_size 32", "64")),
    ("eagle3", {"hidden_size": ...}, ("config.json", "hidden_size")),
    ("eagle3", {"hidden_size": "wide"}, ("config.json", "hidden_size", "int")),
    ("eagle3", {"rope_scaling": {"type": "dynamic", "factor": 2}}, ("dynamic", "llama3")),
    ("eagle3", {"hidden_act": "gelu"}, ("gelu", "silu")),
    ("eagle3", {"num_hidden_layers": 0}, ("num_hidden_layers 0",)),
    ("eagle3", {"norm_output": True}, ("drafter.norm_output=fed_back", "SpecForge")),
    ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, ("eagle_config", "top level")),
    ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}, ("[0, 1, 3]", "0 to 2")),
    ("eagle3", {"num_aux_hidden_states": 5}, ("num_aux_hidden_states", "5")),
    ("eagle3", {"num_attention_heads": 3}, ("3 heads", "2 key-value heads")),
    ("dflash", {"dflash_config": {"target_layer_ids": [0, 1, 2], "mask_token_id": 64}}, ("mask_token_id", "64", "lacks")),
    ("dflash", {"dflash_config": {"target_layer_ids": [0, 1, 2]}}, ("mask_token_id", "'<|MASK|>'", "tokenizer lacks")),
    ("dflash", {"block_size": 3}, ("num_draft_tokens", "3", "2 masks")),
    ("dflash", {"num_target_layers": 36}, ("36 layers", "has 3")),
    ("dflash", {"layer_types": ["full_attention"]}, ("1 layer_types for 2 layers",)),
    ("dflash", {"layer_types": ["chunked_attention"] * 2}, ("chunked_attention",)),
    ("dflash", {"layer_types": ["sliding_attention"] * 2}, ("sliding_window",)),
    ("dflash", {"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
    ("dflash", {"is_causal": True}, ("is_causal",)),
    ("dflash", {"attention_sink_bias": True}, ("attention_sink_bias",)),
    ("dflash", {"attention_sink_bias": [1.0]}, ("attention_sink_bias",)),
    ("eagle3", {"norm_before_residual": True}, ("norm_before_residual", "no reader")),
    ("eagle3", {"model_type": "qwen3"}, ("q_norm",)),
    ("eagle3", {"attention_bias": True}, ("attention_bias",)),
    ("eagle3", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5",)),
    ("eagle3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ("each type",)),
    (
        "dflash",
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7, "use_sliding_window": False},
        ("sliding_window",),
    ),
    ("dflash", {"model_type": "llama"}, ("llama", "qwen3")),
    ("dflash", {"aux_hidden_state_layer_ids": [1]}, ("target_layer_ids", "speculators")),
    ("pard", {"pard_token": ...}, ("pard_token", "no PARD draft")),
    ("pard", {"pard_token": 64}, ("pard_token 64", "64 lacks")),
    ("pard", {"model_type": "mamba"}, ("mamba", "llama, qwen2, qwen3")),
    ("pard", {"pard2": True}, ("pard2_target_layers",)),
    ("pard", {"pard2": True, "pard2_target_layers": [-9]}, ("[-9]", "1 to 3")),
    (
        "pard",
        {"pard2": True, "pard2_target_layers": [-1], "pard2_target_dim": 99},
        ("pard2_target_dim 99", "1 layers of 32"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "words"), BAD_CONFIGS)
def test_bad_configurations(
    tmp_path: Path, target: Target, kind: str, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    """What a file asks for and we do not do, or the target does not have, is named."""
    save(target, kind, {"pard": "qwen3"}.get(kind, "plain"), tmp_path)
    load(kind, tmp_path, target)
    change(tmp_path, **keys)
    refused(lambda: load(kind, tmp_path, target), *words)


def test_norm_output_must_be_told_apart(tmp_path: Path, target: Target) -> None:
    """Once said, SGLang's key feeds the normed state back and SpecForge's does nothing new."""
    save(target, "eagle3", "plain", tmp_path)
    change(tmp_path, norm_output=True)
    assert read("eagle3", tmp_path, norm_output="fed_back").config.norm_output
    assert not read("eagle3", tmp_path, norm_output="before_head").config.norm_output
    convert(tmp_path, tmp_path / "b", "sglang", None, ["drafter.norm_output=fed_back"])
    assert read("eagle3", tmp_path / "b").config.norm_output  # our own file says which
    change(tmp_path, norm_output=False)
    refused(lambda: read("eagle3", tmp_path, norm_output="before_head"), "norm before the head")


def test_a_key_with_two_meanings_is_not_passed_on(tmp_path: Path, target: Target) -> None:
    """SpecForge's ``norm_output: true`` in a file for SGLang would feed the normed state back."""
    save(target, "eagle3", "plain", tmp_path / "a")
    change(tmp_path / "a", norm_output=True)
    convert(tmp_path / "a", tmp_path / "b", "sglang", None, ["drafter.norm_output=before_head"])
    assert "norm_output" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert not read("eagle3", tmp_path / "b").config.norm_output


@pytest.mark.parametrize("kind", FAMILIES)
def test_convert_checks_every_tensor(tmp_path: Path, target: Target, kind: str) -> None:
    """A checkpoint with a shard missing, or a tensor too many, does not become a new checkpoint."""
    save(target, kind, {"pard": "qwen3"}.get(kind, "plain"), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    stored = load_file(path)
    gone = next(name for name in stored if name.endswith("up_proj.weight"))
    save_file({n: t for n, t in stored.items() if n != gone}, path)
    form = DRAFTERS.get(kind).formats.FORMATS[0]
    refused(lambda: convert(tmp_path / "a", tmp_path / "b", form, None, ()), gone, "missing")
    save_file({**stored, "junk": torch.zeros(1)}, path)
    refused(lambda: convert(tmp_path / "a", tmp_path / "b", form, None, ()), "junk")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kind", "form", "tensor"),
    [
        ("eagle3", "sglang", "embed_tokens.weight"),
        ("dflash", "zlab", "embed_tokens.weight"),
        ("dflash", "speculators", "lm_head.weight"),
    ],
)
def test_what_should_be_a_copy_of_the_targets(
    tmp_path: Path, target: Target, kind: str, form: str, tensor: str
) -> None:
    """A copy, rounded or not, is left to the target; another one is of another target."""
    save(target, kind, "plain", tmp_path, form)
    stored = load_file(tmp_path / "model.safetensors")
    weight = target.embedding.weight if "embed" in tensor else target.head.weight
    save_file({**stored, tensor: weight.detach().half()}, tmp_path / "model.safetensors")
    load(kind, tmp_path, target)
    save_file({**stored, tensor: torch.randn_like(weight)}, tmp_path / "model.safetensors")
    refused(lambda: load(kind, tmp_path, target), tensor, "another target")


def test_a_name_for_the_mask_is_written(tmp_path: Path, target: Target) -> None:
    """``mask_token`` without an id survives, and is no mask of speculators."""
    save(target, "dflash", "plain", tmp_path / "a")
    nested = {"target_layer_ids": [0, 1, 2], "mask_token": "<m>"}
    change(tmp_path / "a", dflash_config=nested)
    convert(tmp_path / "a", tmp_path / "b", "sglang", None, ())
    assert read("dflash", tmp_path / "b").config.mask_token == "<m>"
    refused(
        lambda: convert(tmp_path / "a", tmp_path / "c", "speculators", None, ()), "mask_token_id"
    )


def test_a_table_of_wrong_tensors(tmp_path: Path, target: Target) -> None:
    """Missing, unknown and misshapen tensors come one a line, with both shapes."""
    save(target, "eagle3", "plain", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["norm.weight"]
    stored["fc.weight"] = stored["fc.weight"][:-1].clone()
    stored["extra.weight"] = torch.zeros(2)
    save_file(stored, tmp_path / "model.safetensors")
    refused(
        lambda: load("eagle3", tmp_path, target),
        "norm.weight: expected [32], missing",
        "fc.weight: expected [32, 96], found [31, 96]",
        "extra.weight: not a tensor of this drafter, found [2]",
    )


def test_damaged_files(tmp_path: Path, target: Target) -> None:
    """A file cut short, and one that holds code: neither is loaded, neither is run."""
    save(target, "eagle3", "plain", tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: load("eagle3", tmp_path / "a", target), "model.safetensors cannot be read")
    path.unlink()
    refused(lambda: load("eagle3", tmp_path / "a", target), "neither *.safetensors nor")
    (path.parent / "config.json").write_text("{")
    refused(lambda: load("eagle3", tmp_path / "a", target), "is not JSON")
    (path.parent / "config.json").write_text("[]")
    refused(lambda: load("eagle3", tmp_path / "a", target), "not a JSON object")


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_a_warp_model_is_not_run(tmp_path: Path, target: Target, form: str) -> None:
    """PARD-2's ``warp_model.bin`` is read as tensors, whatever else is in it."""
    save(target, "pard", "pard2", tmp_path)
    assert "target_proj.weight" in read("pard", tmp_path).tensors
    spoilt, proof = {"target_proj.weight": Touch(tmp_path / "run")}, tmp_path / "run"
    if form == "zip":
        torch.save(spoilt, tmp_path / "warp_model.bin")
    else:
        (tmp_path / "warp_model.bin").write_bytes(pickle.dumps(spoilt, protocol=2))
    refused(lambda: read("pard", tmp_path), "warp_model.bin")
    assert not proof.exists()
    (tmp_path / "warp_model.bin").unlink()
    refused(lambda: load("pard", tmp_path, target), "target_proj.weight", "missing")


def test_bad_vocabulary_maps(tmp_path: Path, target: Target) -> None:
    """A draft token that is no target token, two that are one, and maps that disagree."""
    save(target, "eagle3", "reduced vocabulary", tmp_path)
    good = load_file(tmp_path / "model.safetensors")

    def with_map(d2t: Tensor, t2d: Tensor = good["t2d"]) -> Any:
        save_file({**good, "d2t": d2t, "t2d": t2d}, tmp_path / "model.safetensors")
        return lambda: load("eagle3", tmp_path, target)

    outside = good["d2t"].clone()
    outside[-1] = 64
    refused(with_map(outside), "d2t", "111", "has 64")
    refused(with_map(good["d2t"] - 64), "d2t", "points at tokens -")
    twice = good["d2t"].clone()
    twice[1] = twice[0] - 1
    refused(with_map(twice), "two draft tokens for one")
    refused(with_map(good["d2t"], ~good["t2d"]), "d2t and t2d", "disagree on 64")


def test_default_feature_layers_are_written_out(tmp_path: Path) -> None:
    """DFlash's and speculators' defaults differ: a file of one must say it when it becomes the other."""
    tiny = TINYWORLD / "dflash"
    assert "target_layer_ids" not in json.loads((tiny / "config.json").read_text())["dflash_config"]
    convert(tiny, tmp_path / "a", "speculators", None, ())
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert raw["aux_hidden_state_layer_ids"] == [2, 8, 14]  # after layers 1, 7 and 13 of 16
    change(tmp_path / "a", aux_hidden_state_layer_ids=None)
    refused(lambda: read("dflash", tmp_path / "a"), "aux_hidden_state_layer_ids", "which layers")


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_tokenizer(tmp_path: Path, tiny_target: Target, kind: str) -> None:
    """A draft that brings another tokenizer than the target's was trained on other ids."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TINYWORLD / kind / name).read_bytes())
    tokenizer = json.loads((TINYWORLD / "target" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    load(kind, tmp_path, tiny_target)
    ids = tokenizer["model"]["vocab"]
    one, other = list(ids)[500], list(ids)[501]
    ids[one], ids[other] = ids[other], ids[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(lambda: load(kind, tmp_path, tiny_target), "another tokenizer", "2 of 2048")


def test_layer_types_that_transformers_derives(tmp_path: Path, target: Target) -> None:
    """``use_sliding_window`` without ``layer_types``: layers from ``max_window_layers`` on slide."""
    save(target, "pard", "qwen3", tmp_path)
    change(
        tmp_path, use_sliding_window=True, sliding_window=9, max_window_layers=1, layer_types=...
    )
    config = read("pard", tmp_path).config
    assert [config.window_of_layer(layer) for layer in range(2)] == [None, 9]


# --- convert ---------------------------------------------------------------------------------


def test_what_a_format_cannot_say_is_refused(tmp_path: Path, target: Target) -> None:
    """A head that SGLang would run wrongly is not written for it, and nothing is left behind."""
    save(target, "eagle3", "speculators", tmp_path / "a", "speculators")
    refused(
        lambda: convert(tmp_path / "a", tmp_path / "b", "sglang", None, ()),
        "norm_before_residual", "q_norm and k_norm",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    save(target, "dflash", "reduced vocabulary", tmp_path / "d", "speculators")
    refused(
        lambda: convert(tmp_path / "d", tmp_path / "b", "zlab", None, ()),
        "reduced vocabulary of 48",
    )
    save(target, "dflash", "sliding", tmp_path / "s")
    refused(
        lambda: convert(tmp_path / "s", tmp_path / "b", "speculators", None, ()),
        "end at the anchor",
    )
    drafter = load("dflash", tmp_path / "d", target)
    assert "reduced vocabulary" in drafter.not_for_sglang()[0]


def test_convert_refuses(tmp_path: Path, target: Target) -> None:
    """Formats and families that there are not, and folders that exist."""
    save(target, "eagle3", "plain", tmp_path / "a")
    a, b = tmp_path / "a", tmp_path / "b"
    refused(lambda: convert(a, b, "gguf", None, ()), "gguf", "sglang, specforge, speculators")
    refused(lambda: convert(a, a, "sglang", None, ()), "exists")
    refused(lambda: convert(a, b, "sglang", None, ["drafter.toes=5"]), "toes")
    refused(lambda: convert(a, b, "sglang", None, ["lr=5"]), "drafter.KEY=VALUE")
    refused(lambda: convert(tmp_path, b, "sglang", None, ()), "config.json cannot be read")
    change(a, architectures=["BertModel"])
    refused(lambda: family_of(a), "no family", "dflash, eagle3, pard", "--kind")
    convert(a, b, "sglang", "eagle3", ())
    refused(lambda: convert(b, tmp_path / "c", "sglang", "pard", ()), "no PARD draft")


def test_two_files_with_one_tensor(tmp_path: Path) -> None:
    """Shards that both have a tensor leave open which one counts."""
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    refused(lambda: read_tensors(tmp_path), "b.safetensors has x")
