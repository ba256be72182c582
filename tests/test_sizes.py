"""Published drafts at their real sizes: every tensor, and what they would take in memory.

Nothing is allocated: networks are built on the meta device from the published ``config.json``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.memory import footprint as footprint_module
from cosched.memory.footprint import Footprint, footprint
from cosched.memory.sketch import TargetSketch
from cosched.memory.sketch import sketch as sketch_of
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config
from cosched.testing.harness import make_target, make_trainer
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from tests.helpers.drafts import make_drafter

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
LLAMA31_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN3_EAGLE3 = {
    "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 1, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936, "draft_vocab_size": 32000,
}  # fmt: skip
LLAMA_EAGLE3 = {
    "architectures": ["LlamaForCausalLMEagle3"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "torch_dtype": "float16", "vocab_size": 128256, "draft_vocab_size": 32000,
}  # fmt: skip
QWEN3_DFLASH = {
    "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "attention_bias": False, "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16", "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": 5, "num_key_value_heads": 8, "num_target_layers": 36,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PARD_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "pard_token": 151670, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "spd_type": "pard", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PARD2_06B = PARD_06B | {
    "spd_type": "pard2", "pard2": True, "pard2_scale": 0.02, "pard2_proj_bias": False,
    "pard2_target_dim": 16384, "pard2_target_layers": [-1, -8, -16, -24],
}  # fmt: skip


def eagle3_tensors(inner: int, vocab: int) -> dict[str, list[int]]:
    layer, attention = "midlayer.", "midlayer.self_attn."
    return {
        "fc.weight": [4096, 12288],
        f"{attention}q_proj.weight": [4096, 8192],
        f"{attention}k_proj.weight": [1024, 8192],
        f"{attention}v_proj.weight": [1024, 8192],
        f"{attention}o_proj.weight": [4096, 4096],
        f"{layer}mlp.gate_proj.weight": [inner, 4096],
        f"{layer}mlp.up_proj.weight": [inner, 4096],
        f"{layer}mlp.down_proj.weight": [4096, inner],
        f"{layer}hidden_norm.weight": [4096],
        f"{layer}input_layernorm.weight": [4096],
        f"{layer}post_attention_layernorm.weight": [4096],
        "norm.weight": [4096],
        "lm_head.weight": [32000, 4096],
        "d2t": [32000],
        "t2d": [vocab],
    }


def qwen3_layer(prefix: str, width: int, queries: int, inner: int) -> dict[str, list[int]]:
    return {
        f"{prefix}self_attn.q_proj.weight": [queries, width],
        f"{prefix}self_attn.k_proj.weight": [1024, width],
        f"{prefix}self_attn.v_proj.weight": [1024, width],
        f"{prefix}self_attn.o_proj.weight": [width, queries],
        f"{prefix}self_attn.q_norm.weight": [128],
        f"{prefix}self_attn.k_norm.weight": [128],
        f"{prefix}mlp.gate_proj.weight": [inner, width],
        f"{prefix}mlp.up_proj.weight": [inner, width],
        f"{prefix}mlp.down_proj.weight": [width, inner],
        f"{prefix}input_layernorm.weight": [width],
        f"{prefix}post_attention_layernorm.weight": [width],
    }


def dflash_tensors() -> dict[str, list[int]]:
    tensors = {"fc.weight": [4096, 20480], "hidden_norm.weight": [4096], "norm.weight": [4096]}
    for i in range(5):
        tensors |= qwen3_layer(f"layers.{i}.", 4096, 4096, 12288)
    return tensors


def pard_tensors() -> dict[str, list[int]]:
    tensors = {"model.embed_tokens.weight": [151936, 1024], "model.norm.weight": [1024]}
    for i in range(28):
        tensors |= qwen3_layer(f"model.layers.{i}.", 1024, 2048, 3072)
    return tensors


def qwen3_8b_bytes() -> int:
    """Of the target in bfloat16: layers, embedding, a head of its own, and the last norm."""
    layer = sum(math.prod(shape) for shape in qwen3_layer("", 4096, 4096, 12288).values())
    return 2 * (36 * layer + 2 * 151936 * 4096 + 4096)


# name: target, draft, kind, drafted tokens, tensors, feature layers ("after that layer"; 36: the
# final norm), millions of parameters, KiB of features and of draft keys and values a token
CASES: dict[str, tuple[dict, dict, str, int, dict, tuple[int, ...], float, int, int]] = {
    "qwen3-eagle3": (
        QWEN3_8B, QWEN3_EAGLE3, "eagle3", 7, eagle3_tensors(12288, 151936), (1, 17, 32), 400, 24, 4,
    ),
    "llama-eagle3": (
        LLAMA31_8B, LLAMA_EAGLE3, "eagle3", 5, eagle3_tensors(14336, 128256), (1, 15, 28), 425, 24, 4,
    ),
    "qwen3-dflash": (
        QWEN3_8B, QWEN3_DFLASH, "dflash", 15, dflash_tensors(), (1, 9, 17, 25, 33), 1049, 40, 20,
    ),
    "qwen3-pard": (QWEN3_8B, PARD_06B, "pard", 12, pard_tensors(), (), 596, 0, 112),
    "qwen3-pard2": (
        QWEN3_8B, PARD2_06B, "pard", 12,
        pard_tensors() | {"target_proj.weight": [1024, 16384]}, (36, 28, 20, 12), 613, 32, 112,
    ),
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "qwen3-pard2" else ())
        for name in CASES
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple]:
    """A target's and a draft's folder with nothing in them but ``config.json``."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("case")
    write_folders(folder, case[0], case[1])
    return folder, case


@pytest.fixture(scope="module")
def counted(case: tuple[Path, tuple]) -> tuple[Footprint, TargetSketch]:
    """What a run of that draft takes, and its target: a whole micro-step of sizes, once a draft."""
    folder, (_, _, kind, drafted, *_) = case
    config = load_config(write_experiment(folder, kind, drafted))
    target, drafter = sketch_of(config)
    return footprint(config, target, drafter), target


def write_folders(folder: Path, target: dict, draft: dict) -> None:
    for name, config in (("target", target), ("draft", draft)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))


def test_published_tensors(case: tuple[Path, tuple]) -> None:
    """Every tensor of the published checkpoint, by name and shape, and none besides."""
    folder, (_, _, kind, drafted, tensors, layers, millions, _, _) = case
    cls = DRAFTERS.get(kind)
    settings = cls.Settings(kind=kind, path=str(folder / "draft"), num_draft_tokens=drafted)
    target = TargetSketch.read(str(folder / "target"), torch.bfloat16)
    drafter = cls.sketch(settings, target)
    network = drafter.network()
    assert {n: list(t.shape) for n, t in network.state_dict().items()} == tensors
    assert all(t.is_meta for t in network.state_dict().values())
    assert drafter.signal.feature_layers == layers
    parameters = sum(p.numel() for p in network.parameters())
    assert round(parameters / 1e6) == millions


def write_experiment(folder: Path, kind: str, drafted: int, **engine: Any) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"text": "a"}\n')
    config = {
        "run": {"name": "sizes"},
        "engine": {"dtype": "bfloat16", "max_batch": 2, **engine},
        "target": {"path": str(folder / "target")},
        "drafter": {"kind": kind, "path": str(folder / "draft"), "num_draft_tokens": drafted},
        "workload": {"prompts": str(prompts), "prompt_tokens": 48, "max_new_tokens": 2000},
        "arms": ["frozen", "adapted"],
        "adapt": {
            "replay": {"window": 512},
            "memory": {"max_bytes": 2**30},
            "policy": {"kind": "every_n_rounds"},
            "loss": {"kind": "forward_kl", "rows": "delayed"},  # no rows of what was drafted
            "guard": {"kind": "finite"},
            "trainer": {"zero_stage": 1},
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_memory_of_published_drafts(
    case: tuple[Path, tuple], counted: tuple[Footprint, TargetSketch]
) -> None:
    """Bytes a token and a parameter, as worked out by hand from the shapes in bfloat16."""
    *_, features, cache = case[1]
    found, target = counted
    held = found.num_draft_parameters
    assert found.feature_bytes_per_token == features * 1024
    assert found.cache_bytes_per_token == cache * 1024
    assert found.teacher_bytes_per_row == 8 * 1024  # the last hidden state
    assert found.draft == 2 * held
    assert (found.masters, found.moments) == (8 * held, 8 * held)
    assert found.step > 4 * held  # the gradients, and what they are worked out of
    assert (found.trainer_copy, found.first_weights) == (4 * held, 4 * held)
    assert found.last_good == 2 * (
        held + found.num_trained
    )  # in the serving type; one version kept
    # Of both targets 2 x layers x 8 heads x 128 x 2 bytes a token, for two requests of 2048.
    assert found.target_cache == 2 * 2048 * 4096 * target.num_layers
    assert found.draft_cache == cache * 1024 * 2 * 2048
    # Two requests, each with room for twice its window.
    assert found.replay == 2 * (2 * 512 * (8 + (features + 8) * 1024) + 8)
    assert found.target is None  # there are no weights to count


def test_the_buffer_admits_what_is_counted(
    case: tuple[Path, tuple], counted: tuple[Footprint, TargetSketch]
) -> None:
    """Requests that ``max_tokens`` keeps out take no memory."""
    folder, (_, _, kind, drafted, *_) = case
    path = write_experiment(folder, kind, drafted)
    config = load_config(path, ["adapt.memory.max_tokens=1000"])
    assert counted[0].replay == 2 * footprint(config, *sketch_of(config)).replay


def test_a_frozen_run_takes_nothing_for_training(case: tuple[Path, tuple]) -> None:
    """Without an adapted arm there is neither a trainer nor a buffer."""
    folder, (_, _, kind, drafted, *_) = case
    config = load_config(write_experiment(folder, kind, drafted), ["arms=[frozen]"])
    found = footprint(config, *sketch_of(config))
    assert found.added == found.draft + found.draft_cache


CARD = 80 * 10**9
# Of SGLang itself outside of its share, for an 8B target: activations of a prefill of 8192 tokens
# and of a verification, CUDA graphs, workspaces of attention and BLAS, the context of CUDA.
RESERVE = 6 * 2**30
TOKENS = 2048  # of each running request that the caches must hold at least


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        ("eagle3", QWEN3_EAGLE3),
        ("dflash", QWEN3_DFLASH),
        pytest.param("pard", PARD_06B, marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
def test_shipped_configurations_fit_the_card_they_name(
    kind: str, draft: dict, captured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's share holds what it must, and what it leaves holds the rest: "one GPU (80 GB)".

    Guards against a fraction that was chosen for a smaller draft: DFlash's, at 0.75, left 19 GiB
    for 22 and activations.
    """
    write_folders(tmp_path, QWEN3_8B, draft)
    paths = [f"target.path={tmp_path / 'target'}", f"drafter.path={tmp_path / 'draft'}"]
    wanted = [f"adapt.trainer.cuda_graph={'always' if captured else 'never'}"]
    if captured and kind == "pard":  # as the file says
        wanted.append("engine.arguments.mem_fraction_static=0.75")
    monkeypatch.setattr(footprint_module, "device_of", lambda _: torch.device("cuda"))
    config = load_config(Path(f"configs/serve_qwen3_8b_{kind}.yaml"), [*paths, *wanted])
    target, drafter = sketch_of(config)
    found = footprint(config, target, drafter)
    share = config.engine.arguments["mem_fraction_static"] * CARD
    a_token = 2 * target.cache_width + found.cache_bytes_per_token
    caches = TOKENS * config.engine.max_batch * a_token
    inside = qwen3_8b_bytes() + found.within_sglang - found.draft_cache + caches
    assert inside <= share
    assert found.beside_sglang + RESERVE <= CARD - share


def test_what_training_takes_lies_within_or_beside(
    case: tuple[Path, tuple], counted: tuple[Footprint, TargetSketch]
) -> None:
    """Beside SGLang's share lies what is made after its caches are, or made anew for each update: SGLang
    gives back what a rehearsal has let go before it measures. The moments stay."""
    folder, (_, _, kind, drafted, *_) = case
    found = counted[0]
    held = found.num_draft_parameters
    assert found.within_sglang == (2 * 2 + 2 * 4 + 8 + 8) * held + found.draft_cache
    kept = 2 * held  # the one version of ``publish.keep``
    assert found.beside_sglang == kept + found.words + found.step + found.replay
    frozen = load_config(write_experiment(folder, kind, drafted), ["arms=[frozen]"])
    assert footprint(frozen, *sketch_of(frozen)).beside_sglang == 0


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_holds_what_is_said(stage: int) -> None:
    """Masters and moments after a step are as large as the table says, 4 and 8 bytes each."""
    target = make_target()
    drafter = make_drafter(target)
    trainer: DeepSpeedTrainer = make_trainer(target, drafter, zero_stage=stage)
    trained = sum(p.numel() for p in trainer.weights().values())
    optimizer = trainer._engine.optimizer
    groups = getattr(optimizer, "single_partition_of_fp32_groups", [])
    assert bytes_of(groups) == (4 * trained if stage else 0)
    parameters = [p for g in trainer._base_optimizer.param_groups for p in g["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer._base_optimizer.step()
    moments = [
        value
        for state in trainer._base_optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    assert bytes_of(moments) == 8 * trained


def test_target_weights_are_counted_from_the_headers(tinyworld: Path) -> None:
    """As many elements as the loaded model has parameters, tied ones once."""
    target = TargetSketch.read(str(tinyworld / "target"), torch.float32)
    assert target.num_parameters() == 6_889_664
