"""Targets as people publish them: what the embedded engine runs exactly, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from cosched.engines.embedded import proof
from cosched.engines.embedded.proof import prove
from cosched.engines.embedded.target import Target, load_tokenizer
from cosched.memory.sketch import TargetSketch
from cosched.memory.targets import check_embedded, check_head
from cosched.testing.harness import decode, make_engine, make_requests
from tests.helpers.checkpoints import refused
from tests.helpers.paths import TINYWORLD

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def random_target(model: Any) -> Target:
    """A target whose positions matter: large weights, so that what is hidden shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    model.set_attn_implementation("cosched_grouped")
    return Target(model, "somewhere")


WINDOWED = [
    lambda window: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)),
    lambda window: Phi3ForCausalLM(Phi3Config(**SMALL, sliding_window=window)),
]


@pytest.mark.parametrize("make", WINDOWED, ids=["mistral", "phi3"])
def test_a_window_without_layer_types_is_kept(make: Any) -> None:
    """Mistral's and Phi-3's ``sliding_window`` holds in every layer: masked, and proven to be.

    It was ignored, and logits were wrong from the window on, by as much as the largest of them.
    """
    target = random_target(make(16))
    assert target.window == 16
    assert prove(target, 120) < 1e-4
    target.window = None
    refused(lambda: prove(target, 120), "differ from the model's own", "on a text of 48 tokens")
    assert prove(target, 16) < 1e-4  # no text of the run is longer: nothing is hidden
    assert random_target(make(None)).window is None


def test_half_precision_is_told_from_a_mistake() -> None:
    """It rounds between layers, in both ways, and by less than a window that is ignored shows."""
    target = random_target(WINDOWED[0](16).bfloat16())
    assert prove(target, 120) < proof.HALF
    target.window = None
    refused(lambda: prove(target, 120), "differ from the model's own")


def test_text_behind_a_window_is_the_models_own() -> None:
    """Greedy text of 60 tokens over a window of 16 is what the model itself generates."""
    target = random_target(WINDOWED[0](16))
    requests = make_requests(target, 2, 10, 50)
    ours = decode(make_engine(target, None, requests, max_batch=2), requests)
    for request in requests:
        ids = request.prompt_P[None]
        for _ in range(50):
            ids = torch.cat((ids, target.model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert ours[request.id] == ids[0, -50:].tolist()


def test_an_attention_that_the_engine_does_not_know() -> None:
    """Gemma-2 caps its scores inside attention, which the engine's own leaves out."""
    config = Gemma2Config(
        **SMALL, head_dim=16, attn_logit_softcapping=1.0, layer_types=["full_attention"] * 3
    )
    target = random_target(Gemma2ForCausalLM(config))
    refused(lambda: prove(target, 100), "differ from the model's own", "serve it with SGLang")


def test_a_model_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """A traceback from inside transformers becomes a refusal of that target."""
    monkeypatch.setattr(proof, "_as_served", lambda *_: {}["cache_params"])
    refused(lambda: prove(target, 100), "cannot be run", "cache_params", "SGLang")


def test_the_plain_pass_leaves_the_model_as_it_was(target: Target) -> None:
    """After the proof the engine's own attention serves."""
    loaded = Target.load(str(TINYWORLD / "target"), torch.device("cpu"), torch.float32)
    prove(loaded, 512)
    assert loaded.model.config._attn_implementation == "cosched_grouped"


CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (
        {"model_type": "qwen3_next", "full_attention_interval": 4},
        ("linear_attention", "qwen3_next"),
    ),
    ({"model_type": "qwen3_5_text"}, ("linear_attention", "qwen3_5_text", "SGLang")),
    ({"model_type": "gpt_oss"}, ("full_attention and sliding_attention",)),
    ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, ("quantised (fp8)",)),
    ({"model_type": "qwen3_vl", "text_config": {}}, ("several parts (qwen3_vl)",)),
    ({"model_type": "mammoth"}, ("transformers", "mammoth")),
]


@pytest.mark.parametrize(("keys", "words"), CONFIGS)
def test_targets_that_only_sglang_runs(
    tmp_path: Path, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Refused by name from ``config.json`` alone, before anything is loaded."""
    raw = {**SMALL, "num_hidden_layers": 4, **keys}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(lambda: check_embedded(tmp_path, raw), "target.path", *words)


def test_targets_that_it_runs(tmp_path: Path) -> None:
    for keys in (
        {"model_type": "qwen3"},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
    ):
        raw = {**SMALL, **keys}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        check_embedded(tmp_path, raw)


def test_a_quantised_head_teaches_nobody(tmp_path: Path) -> None:
    """What SGLang would serve with such a head is refused before it is started."""
    check_head(
        TINYWORLD, {"lm_head.weight": "BF16", "model.layers.0.mlp.up_proj.weight": "F8_E4M3"}
    )
    for name, dtype in (("lm_head.weight", "F8_E4M3"), ("lm_head.qweight", "I32")):
        refused(lambda n=name, d=dtype: check_head(tmp_path, {n: d}), name, dtype, "left out")
    sketch = TargetSketch.read(str(TINYWORLD / "target"), torch.float32)
    tensors = load_file(TINYWORLD / "target" / "model.safetensors")
    assert sketch.tensor_types().keys() == tensors.keys()
    assert set(sketch.tensor_types().values()) == {"BF16"}
    assert sketch.num_parameters() == sum(tensor.numel() for tensor in tensors.values())


def test_a_target_without_a_tokenizer(tmp_path: Path) -> None:
    """transformers makes an empty one of such a folder, and every text then had 0 tokens."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TINYWORLD / "target" / name).read_bytes())
    refused(lambda: load_tokenizer(str(tmp_path)), "no tokenizer in", "tokenizer.json")
