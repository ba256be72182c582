"""Public checkpoint formats: read and written bit by bit, with what each can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cosched.convert_checkpoint import convert
from cosched.engines.embedded.target import Target
from cosched.records import Segment
from cosched.registry import DRAFTERS
from drafters.checkpoint import Checkpoint
from drafters.eagle3 import Eagle3Config
from drafters.eagle3 import formats as eagle3_formats
from drafters.layers import Rotary
from tests.helpers.checkpoints import FAMILIES, example, load, read, refused, same, save


def examples() -> list[tuple[str, str]]:
    from cosched.testing.harness import make_target

    target = make_target()
    return [(kind, name) for kind in FAMILIES for name in DRAFTERS.get(kind).examples(target, 3)]


@pytest.mark.parametrize(("kind", "name"), examples())
def test_round_trip(tmp_path: Path, target: Target, kind: str, name: str) -> None:
    """Written in each format that can express it and read back: the same shape, the same bits."""
    cls = DRAFTERS.get(kind)
    network = example(target, kind, name).network()
    tensors = dict(network.state_dict())
    written = 0
    for form in cls.formats.FORMATS:
        checkpoint = Checkpoint(network.config, tensors, form)
        if kind != "pard" and cls.formats.unfit(network.config, form):
            refused(lambda f=form, c=checkpoint: cls.formats.write(c, tmp_path / f, f), form)
            continue
        cls.formats.write(checkpoint, tmp_path / form, form)
        back = read(kind, tmp_path / form)
        assert same(back.tensors, tensors)
        again = tmp_path / f"{form}-again"
        cls.formats.write(back, again, form)
        assert same(read(kind, again).tensors, tensors)
        for found in (back, read(kind, again)):
            assert comparable(found.config) == comparable(network.config)
        written += 1
    assert written > 0


def comparable(config: Any) -> dict[str, Any]:
    """A shape with what may be said in two ways said in one, and what shapes nothing left out."""
    keys = {key: getattr(config, key) for key in config.__struct_fields__}
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"):
        del keys[key]
    full = ["full_attention"] * config.num_hidden_layers
    keys |= {
        "rope": config.rope,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width_of_head,
        "layer_types": config.layer_types or full,
    }
    if "sliding_attention" not in keys["layer_types"]:
        for key in ("sliding_window", "sliding_causal", "window_from"):
            keys.pop(key, None)
    for key in ("spd_type", "use_sliding_window", "pard2_target_dim", "ids_by_target"):
        keys.pop(key, None)
    return keys


@pytest.mark.parametrize(
    ("kind", "name", "there", "back"),
    [
        ("eagle3", "reduced vocabulary", "speculators", "sglang"),
        ("eagle3", "reduced vocabulary", "specforge", "sglang"),
        ("dflash", "plain", "speculators", "zlab"),
        ("dflash", "sliding", "specforge", "sglang"),
    ],
)
def test_convert_there_and_back(
    tmp_path: Path, target: Target, kind: str, name: str, there: str, back: str
) -> None:
    """Through another format and home again: the same drafter, and its companions come along."""
    save(target, kind, name, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b", there, None, ())
    convert(tmp_path / "b", tmp_path / "c", back, None, ())
    first, last = (load(kind, tmp_path / folder, target) for folder in "ac")
    assert same(dict(first.network().state_dict()), dict(last.network().state_dict()))
    assert first.signal == last.signal
    assert comparable(first.network().config) == comparable(last.network().config)
    assert (tmp_path / "c" / "tokenizer_config.json").read_text() == "{}"


def test_feature_layers_are_counted_as_each_format_does(tmp_path: Path, target: Target) -> None:
    """'After layer 0, 1, 2' is [0, 1, 2] for SGLang and [1, 2, 3] for speculators."""
    save(target, "eagle3", "plain", tmp_path / "e-sgl")
    save(target, "eagle3", "plain", tmp_path / "e-spec", "speculators")
    save(target, "dflash", "plain", tmp_path / "d-zlab")
    save(target, "dflash", "plain", tmp_path / "d-spec", "speculators")
    raw = {p.name: json.loads((p / "config.json").read_text()) for p in tmp_path.iterdir()}
    assert raw["e-sgl"]["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert raw["e-spec"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert raw["d-zlab"]["dflash_config"]["target_layer_ids"] == [0, 1, 2]
    assert raw["d-spec"]["aux_hidden_state_layer_ids"] == [1, 2, 3]


def test_names_of_other_writers(tmp_path: Path, target: Target) -> None:
    """``layers.0``, a ``model.`` in front, ``aux_norm_low`` and a copy of the embedding are known."""
    network = example(target, "eagle3", "plain").network()
    config = msgspec.structs.replace(network.config, fc_norm=True)
    norms = {f"fc_norm.{i}.weight": torch.randn(target.hidden_size) for i in range(3)}
    tensors = {**network.state_dict(), **norms}
    eagle3_formats.write(Checkpoint(config, tensors, "sglang"), tmp_path, "sglang")
    stored = load_file(tmp_path / "model.safetensors")
    for old, new in (("midlayer", "model.layers.0"), ("fc_norm.0", "aux_norm_low")):
        stored = {n.replace(old, new): t for n, t in stored.items()}
    stored = {n.replace("fc_norm.1", "aux_norm_mid"): t for n, t in stored.items()}
    stored = {n.replace("fc_norm.2", "aux_norm_high"): t for n, t in stored.items()}
    stored["embed_tokens.weight"] = target.embedding.weight.clone()
    (tmp_path / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin")
    found = load("eagle3", tmp_path, target).network().state_dict()
    assert found.keys() == tensors.keys()
    assert torch.equal(found["fc_norm.2.weight"], norms["fc_norm.2.weight"])


def test_an_embedding_of_its_own_is_kept(tmp_path: Path, target: Target) -> None:
    """speculators may have trained the embedding: then it serves, is saved, and SGLang is named."""
    save(target, "eagle3", "plain", tmp_path, "speculators")
    stored = load_file(tmp_path / "model.safetensors")
    stored["embed_tokens.weight"] = target.embedding.weight.clone()
    save_file(stored, tmp_path / "model.safetensors")
    assert load("eagle3", tmp_path, target).network().embed_tokens is None  # a copy
    stored["embed_tokens.weight"] += 1
    save_file(stored, tmp_path / "model.safetensors")
    drafter = load("eagle3", tmp_path, target)
    assert torch.equal(drafter.network().embed_tokens.weight, stored["embed_tokens.weight"])
    assert "embedding of its own" in drafter.not_for_sglang()[0]
    drafter.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["embed_tokens.weight"], stored["embed_tokens.weight"])


def test_a_trained_mask_embedding_stays_with_the_draft(tmp_path: Path, target: Target) -> None:
    """``mask_embedding.pt`` changes what is drafted and is saved again; the target stays as it is."""
    save(target, "dflash", "plain", tmp_path)
    before, table = load("dflash", tmp_path, target), target.embedding.weight.clone()
    own = torch.randn(target.hidden_size)
    torch.save({"embedding": own, "mask_token_id": 1}, tmp_path / "mask_embedding.pt")
    after = load("dflash", tmp_path, target)
    assert not torch.equal(proposed(before), proposed(after))
    assert torch.equal(target.embedding.weight, table)
    after.save(tmp_path / "saved")
    again = load("dflash", tmp_path / "saved", target)
    assert torch.equal(again.network().mask_embedding, own)
    assert torch.equal(proposed(again), proposed(after))
    # The row of the target's embedding as a mask of the draft's own is what was there before.
    torch.save({"embedding": table[1], "mask_token_id": 1}, tmp_path / "mask_embedding.pt")
    assert torch.equal(proposed(load("dflash", tmp_path, target)), proposed(before))
    torch.save({"embedding": own, "mask_token_id": 2}, tmp_path / "mask_embedding.pt")
    refused(lambda: load("dflash", tmp_path, target), "mask token 2", "mask_token_id 1")
    (tmp_path / "mask_embedding.pt").write_bytes(b"PK")
    refused(lambda: load("dflash", tmp_path, target), "mask_embedding.pt")


def proposed(drafter: Any) -> Tensor:
    state = drafter.new_state(1, 16, None)
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(5, 96, generator=generator)
    drafter.observe(state, 0, Segment("r", 0, torch.arange(2, 8), features, None))
    number = drafter.num_draft_tokens
    return drafter.propose(state, 1, lambda _k, logits: logits.argmax(-1), number).logits_BKV


# --- rope ------------------------------------------------------------------------------------


def test_rope_theta_is_found_where_transformers_5_puts_it() -> None:
    """``rope_parameters`` alone must not silently mean a base of 10,000."""
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 8,
    }  # fmt: skip
    old = Eagle3Config(**shape, rope_theta=1e6)
    new = Eagle3Config(**shape, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    assert torch.equal(old.inverse_frequencies()[0], new.inverse_frequencies()[0])
    other = Eagle3Config(**shape)
    assert not torch.equal(old.inverse_frequencies()[0], other.inverse_frequencies()[0])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda scaling: str(scaling.get("rope_type", "older key")),
)
def test_rope_scaling(scaling: dict[str, Any]) -> None:
    """Rotations are those of transformers, to float32 rounding of angles up to 300 (1e-4)."""
    config = Eagle3Config(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=8,
        max_position_embeddings=512, rope_theta=500.0, rope_scaling=scaling,
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64, num_attention_heads=4, max_position_embeddings=512,
            rope_parameters={"rope_theta": 500.0, **config.rope},
        )
    )  # fmt: skip
    at = torch.arange(300)
    cos, sin = theirs(torch.zeros(1), at[None])
    ours = Rotary(config)
    ours.reserve(300)
    table = torch.cat((cos[0, :, :8], sin[0, :, :8]), -1)
    assert torch.allclose(ours.table_TD, table, atol=1e-4)
