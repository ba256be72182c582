"""The model of benchmarks/gpu_model.md against the code that it is a model of."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from cosched.engines.embedded.target import Target
from cosched.protocols import LossSettings
from cosched.records import Decision
from cosched.testing.counting import Counting
from cosched.tinyworld.distill import crops_to_batch
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from losses.divergence import ForwardKL

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = 64


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_model")


def narrow(model: Any, kind: str) -> tuple[Any, Any, Any]:
    """A target and a draft of the real number of layers, few numbers wide, and the model of that draft."""
    sizes = model.Sizes(64, 192, 64, 32, 256, 36)
    target = Target(
        Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=64, intermediate_size=192, num_hidden_layers=36, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=1024,
                tie_word_embeddings=False,
            )
        )
    )  # fmt: skip
    update = importlib.import_module("bench_update")
    update.PUBLISHED["pard"] |= {
        "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2,
    }  # fmt: skip
    expected = {
        "eagle3": lambda: model.eagle3(sizes, WORDS),
        "dflash": lambda: model.dflash(sizes),
        "pard": lambda: model.pard(sizes, model.Sizes(32, 96, 32, 32, 256, 28)),
    }[kind]()
    return target, update.make_drafter(kind, target, expected.path, WORDS, True), expected


@pytest.mark.parametrize(
    "requests", [1, pytest.param(16, marks=(pytest.mark.slow, pytest.mark.long))]
)
@pytest.mark.parametrize(
    "kind", ["eagle3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dflash", "pard"))]
)
def test_operations_and_launches_are_those_of_a_micro_step(
    model: Any, kind: str, requests: int
) -> None:
    """The code changes, and a model of what it was would be held against what it is."""
    target, drafter, expected = narrow(model, kind)
    network = drafter.network()
    matrices = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert matrices == expected.trained
    assert len(list(network.parameters())) == expected.tensors
    copy = drafter.clone(torch.float32)
    batch_loss = BatchLoss(copy, ForwardKL(LossSettings(kind="forward_kl")), target.head, "hidden")
    trainer = DeepSpeedTrainer(batch_loss, list(copy.scopes()["full"].parameters), 0, 3e-4, 1.0)
    window, path, share = expected.window, expected.path, model.ANCHORS // requests
    anchors_N = torch.arange(window - path - share, window - path) + 1
    with torch.no_grad():
        ids_RT = torch.randint(5, 256, (requests, window + 1))
        batch = crops_to_batch(target, drafter, ids_RT, anchors_N.expand(requests, -1), path)
    trainer.update(batch, Decision(num_steps=1))  # what is made once
    with FlopCounterMode(display=False) as operations:
        trainer.update(batch, Decision(num_steps=1))
    with Counting() as launches:
        trainer.update(batch, Decision(num_steps=1))
    with torch.no_grad(), Counting() as forwards:
        copy.replay_states(batch)
    found = model.work(expected, requests).whole
    if (
        expected.context_attends
    ):  # the context's attention is one that PyTorch does not count on a CPU
        found -= 3 * 4 * requests * window**2 * expected.attends
    # Left out: some rows of the top layer, the mass outside of the draft's words.
    assert found == pytest.approx(operations.get_total_flops(), rel=0.05)
    # Another version of PyTorch may put an operator together from others.
    assert launches.num_launches == pytest.approx(expected.launches, rel=0.1)
    # Several requests are padded to one length: some masks more than one has.
    assert forwards.num_launches == pytest.approx(
        expected.forward, rel=0.1 if requests == 1 else 0.15
    )


def test_the_page_has_the_tables_that_the_script_prints(model: Any) -> None:
    """A size that is changed in one place would be wrong in the other."""
    page = (BENCHMARKS / "gpu_model.md").read_text(encoding="utf-8")
    between = page.partition("<!-- model:begin -->")[2].partition("<!-- model:end -->")[0]
    assert between.strip() == model.tables()


def test_what_is_quicker_is_expected_to_be(model: Any) -> None:
    """Products in bfloat16 and a graph can only help, and more requests can only cost more."""
    for kind in model.DRAFTS:
        slow, quick, graph = (
            model.expected(kind, 1, *how)
            for how in (("float32", "eager"), ("bfloat16", "eager"), ("bfloat16", "graph"))
        )
        assert slow.share >= quick.share >= graph.share > 0
        assert model.expected(kind, 16, "bfloat16").flops > quick.flops
