"""The same statements on a CUDA device; `benchmarks/gpu_check.sh` runs them."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.engines.request import GenerationRequest
from cosched.records import Decision, SignalBatch
from cosched.registry import DRAFTERS
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import RunFolder
from cosched.testing.captured import by_doing
from cosched.testing.harness import (
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)
from cosched.training.captured import Captured
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.precision import Precision
from tests.helpers.captured import make_frames, ragged
from tests.helpers.chunks import (
    CHUNK,
    LOSSES_TO_TEST,
    MOST,
    VOCAB,
    make_batch,
    make_drafter,
    make_loss,
)
from tests.helpers.paths import TINYWORLD

DEVICE = os.environ.get("COSCHED_TEST_DEVICE", "cuda")  # a dry run of gpu_check.sh says cpu
OFTEN = ("adapt.policy.kind=every_n_rounds", "adapt.policy.rounds=4")
GUARDED = (*OFTEN, "adapt.guard={kind: shadow, anchors: 8, false_publish: 0.5}")
LEARNT = (*OFTEN, "adapt.guard.kind=finite")
WAYS = {
    "as a file gets it that says nothing, but sooner": (
        "adapt.policy.rounds=4", "adapt.guard={anchors: 8}",
    ),
    "guarded": GUARDED,
    "hedge": (*GUARDED, "adapt.objective={kind: hedge, experts: [{}, {lr: 1.0e-3}]}"),
    "tail": (*LEARNT, "adapt.scope.kind=tail"),
    "lora per request": (*LEARNT, "adapt.scope={kind: lora, rank: 4, state: per_request}"),
    "lora per tenant": (
        *LEARNT, "adapt.scope={kind: lora, rank: 4, state: per_tenant, tenants: [a]}",
    ),
    "in chunks": (*LEARNT, "adapt.memory.chunk_rows=8"),
    "near the draft before": (
        *LEARNT, "adapt.policy.num_steps=2",
        "adapt.loss={kind: sum, terms: [{kind: forward_kl}, {kind: proximal_kl, weight: 0.5}]}",
    ),
    "top-k teacher": (*LEARNT, "adapt.replay.teacher=top_k"),
    "in the background": (*LEARNT, "adapt.trainer.background=true"),
    "captured": (*LEARNT, "adapt.trainer.cuda_graph=always"),
}  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_greedy_equals_plain_on_cuda(kind: str, adapted: bool, max_batch: int) -> None:
    """Token for token in float32, with updates and publications on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Target(make_target().model.to(DEVICE))
    requests = [
        GenerationRequest(r.id, r.prompt_P.to(DEVICE), r.max_new_tokens)
        for r in make_requests(target, count=4, prompt=7, new=256)
    ]
    plain = decode(make_engine(target, None, requests, max_batch), requests)
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    drafter.network().to(DEVICE).requires_grad_(False)
    drafter = drafter.clone(torch.float32)  # vocabulary maps are read where the weights are
    observer = make_coscheduler(target, drafter, every=10, lr=3e-3) if adapted else None
    engine = make_engine(target, drafter, requests, max_batch, observer=observer)
    before = target.checksum()
    assert decode(engine, requests) == plain
    assert target.checksum() == before
    if observer is not None:
        assert observer.version >= 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_every_way_to_learn_runs_on_cuda(kind: str, way: str, tmp_path: Path) -> None:
    """From files to files, on real text: updates are made, and no text differs from the plain one."""
    texts = (TINYWORLD / "prompts" / "translated.jsonl").read_text().splitlines()[:2]
    prompts = [{**json.loads(text), "tenant": "a"} for text in texts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    settings = {
        "run": {"name": "way", "dir": str(tmp_path)},
        "engine": {"device": DEVICE, "max_batch": 2},
        "target": {"path": f"{TINYWORLD}/target"},
        "drafter": {"kind": kind, "path": f"{TINYWORLD}/{kind}", "num_draft_tokens": 3},
        "workload": {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 96},
        "arms": ["plain", "adapted"],
    }
    (tmp_path / "way.yaml").write_text(json.dumps(settings))  # JSON is YAML
    config = load_config(tmp_path / "way.yaml", WAYS[way])
    folder = RunFolder(config.run_folder)
    folder.create()
    adapted = Experiment(config).run(folder).arms["adapted"]
    assert adapted.lossless_mismatches == 0
    assert adapted.updates > 0
    if "adapt.guard.kind=finite" in WAYS[way]:
        assert adapted.versions > 0


@pytest.mark.skipif(DEVICE == "cpu", reason="counts what CUDA's allocator gave")
@pytest.mark.parametrize("loss", LOSSES_TO_TEST)
def test_logits_are_held_of_one_chunk_on_cuda(loss: str) -> None:
    """Of 512 rows: what a step allocates beyond gradients is that of a chunk, not of all rows."""
    target = Target(make_target(VOCAB).model)
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = on_device(make_batch(target, drafter, num_anchors=64))
    target.model.to(DEVICE)
    drafter.network().to(DEVICE)

    def allocated(chunk_rows: int | None) -> float:
        """At most, in rows of logits."""
        module = BatchLoss(drafter, make_loss(loss), target.head, "hidden", chunk_rows=chunk_rows)
        module.begin_update(batch)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module(batch).backward()
        found = torch.cuda.max_memory_allocated() - before
        drafter.network().zero_grad()
        return found / (4 * VOCAB)

    gradients = 2 * sum(p.numel() for p in drafter.network().parameters()) / VOCAB
    assert allocated(CHUNK) < MOST * CHUNK + gradients + 64  # the rest: states, attention
    assert allocated(None) > 2 * 512


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_captured_updates_are_eager_ones(kind: str, precision: Precision) -> None:
    """Over updates of other requests, lengths and objectives, each of several steps: losses and weights
    differ by the order of sums, which is another one on a GPU each time. A dry run has a stand-in."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)
    target = make_target()
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    drafter.network().requires_grad_(False)
    batches = [on_device(ragged(target, drafter, count, seed=count)) for count in (3, 4, 1, 3)]
    target.model.to(DEVICE)
    drafter.network().to(DEVICE)
    record = by_doing if DEVICE == "cpu" else None
    made = []
    for frames in (make_frames(), None):
        copy = drafter.clone(torch.float32)
        names = [name for name, _ in copy.network().named_parameters()]
        losses = make_loss("forward_kl"), [make_loss("sum")]
        module = BatchLoss(copy, losses[0], target.head, "hidden", losses[1], precision)
        capture = partial(Captured, record=record, must=True)
        made.append(DeepSpeedTrainer(module, names, 0, 1e-3, 1.0, frames=frames, capture=capture))
    captured, eager = made
    rounding = 1e-4 if precision == "float32" else 2e-2
    for number, batch in enumerate(batches):
        decision = Decision(3, objective=number % 2)
        found, expected = captured.update(batch, decision), eager.update(batch, decision)
        assert found.losses == pytest.approx(expected.losses, rel=rounding)
        assert found.num_skipped == 0
    moved = max(float((w - captured._initial[n]).abs().max()) for n, w in eager.weights().items())
    for name, weight in captured.weights().items():
        torch.testing.assert_close(weight, eager.weights()[name], rtol=0, atol=0.1 * moved)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_offloaded_optimizer_takes_the_same_steps(stage: int) -> None:
    """Over two updates, a reset and what was saved before it; what the optimizer holds is the host's."""
    target = make_target()
    drafter = next(iter(DRAFTERS.get("eagle3").examples(target, 3).values()))
    batch = on_device(make_batch(target, drafter, num_anchors=16))
    target.model.to(DEVICE)
    drafter.network().to(DEVICE)
    losses: list[tuple[float, ...]] = []
    for offload in (True, False):
        copy = drafter.clone(torch.float32)
        names = [name for name, _ in copy.network().named_parameters()]
        module = BatchLoss(copy, make_loss("forward_kl"), target.head, "hidden")
        trainer = DeepSpeedTrainer(module, names, stage, 1e-3, 1.0, offload=offload)
        found = trainer.update(batch, Decision(2)).losses
        saved = trainer.state()
        found += trainer.update(batch, Decision(2)).losses
        trainer.reset()
        trainer.restore(saved)
        found += trainer.update(batch, Decision(2)).losses
        losses.append(found)
        held = {value.device.type for name, value in saved.items() if "exp_avg" in name}
        assert held == {"cpu" if offload else torch.device(DEVICE).type}
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][2:4] == pytest.approx(losses[0][4:], rel=1e-3)


def on_device(batch: SignalBatch) -> SignalBatch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: t.to(DEVICE) for name, t in tensors.items() if isinstance(t, Tensor)}
    of = moved["starts_R"], moved["weights_RNK"], moved["teacher_RNKX"]
    layout = batch.layout and replace(batch.layout, of=of)
    return replace(batch, **moved, layout=layout)
