"""How much of logits is held at once, by losses and by scores, and what sizes say of it.

Letters: R requests, N anchors, K drafted tokens, M rows, V vocabulary, H state width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from cosched.build.embedded import build_world, load_drafter
from cosched.build.trainer import build_scorer, build_trainer
from cosched.guard.scorer import AcceptanceScorer
from cosched.loop.replay import ReplayLimits
from cosched.memory import footprint as footprint_module
from cosched.memory.capturing import frames_of
from cosched.memory.footprint import footprint, losses_of
from cosched.memory.full_size import (
    batch_of_look,
    batch_of_update,
    batches_of_update,
    full_batch,
)
from cosched.memory.live import LivePeak
from cosched.memory.peaks import scores_peak, step_peak
from cosched.memory.sketch import sketch as sketch_of
from cosched.records import Decision, SignalBatch
from cosched.settings.load import load_config
from cosched.testing.captured import by_doing
from cosched.testing.harness import make_target, make_trainer
from cosched.testing.specimen import MetaTarget
from cosched.training.captured import Captured
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from tests.helpers.chunks import (
    CHUNK,
    DRAFTERS_TO_TEST,
    LOSSES_TO_TEST,
    MOST,
    PATH,
    QWEN3_VOCAB,
    VOCAB,
    is_as_wide,
    is_logits,
    large_target,
    make_batch,
    make_drafter,
    make_loss,
    make_scorer,
    peak_rows,
    two_of,
)
from tests.helpers.guarded_runs import SAMPLED


def peaks(
    kind: str, example: str, loss: str, num_anchors: int, chunk_rows: int | None
) -> tuple[float, float]:
    """Of logits, and of all that is as wide, in chunks."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    batch = make_batch(target, drafter, num_anchors)
    own = {"acceptance_prefix": True, "hardest_share": 0.7}
    built = make_loss(loss, **own)
    module = BatchLoss(drafter, built, target.head, "hidden", chunk_rows=chunk_rows)
    logits, wide = (peak_rows(module, batch, counts) for counts in (is_logits, is_as_wide))
    return logits / CHUNK, wide / CHUNK


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, marks=() if loss in {"forward_kl", "sum"} else pytest.mark.slow)
        for loss in LOSSES_TO_TEST
    ],
)
def test_logits_are_held_of_one_chunk(loss: str) -> None:
    """One chunk of the student's and one of the teacher's (and of the reference's, if asked for).

    Softmaxes, gradients and all else that is as wide are a fixed number of chunks, however many rows
    there are: 64, or twice as many. Without chunks the same count finds all rows.
    """
    sides = 3 if loss == "sum" else 2
    few, many = (peaks("eagle3", "plain", loss, anchors, CHUNK) for anchors in (8, 16))
    assert few[0] == many[0] == sides
    assert few[1] == many[1] <= MOST
    whole = peaks("eagle3", "plain", loss, 8, None)
    assert whole[0] == 64 / CHUNK * sides
    assert whole[1] > MOST


@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_logits_of_every_kind_of_head_are_held_of_one_chunk(kind: str, example: str) -> None:
    """The draft's own head, one over some tokens, the target's, and one tied to the embedding."""
    reduced = example == "reduced vocabulary"  # then only the teacher is as wide as is counted
    few, many = (peaks(kind, example, "forward_kl", anchors, CHUNK) for anchors in (8, 16))
    assert few[0] == many[0] == (1 if reduced else 2)
    assert few[1] == many[1] <= MOST
    assert peaks(kind, example, "forward_kl", 8, None)[0] == few[0] * 64 / CHUNK


def test_rows_that_do_not_count_are_not_projected() -> None:
    """Half of the rows have weight zero: their logits are never made."""
    target = large_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 8)
    batch.weights_RNK[:, ::2] = 0
    module = BatchLoss(drafter, make_loss("forward_kl"), target.head, "hidden")
    assert peak_rows(module, batch, is_logits) == 2 * 32
    batch.weights_RNK.zero_()  # a rank's share may have none at all
    assert peak_rows(module, batch, is_logits) == 0
    assert module(batch).item() == 0


@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_scores_hold_logits_of_one_chunk(kind: str, example: str) -> None:
    """However many rows are scored, and of however many drafts; without chunks, of all rows.

    A chunk of the teacher has become its softmax when the student's is made.
    """
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)

    def peak(num_anchors: int, chunk_rows: int | None, counts: Any) -> float:
        batch = make_batch(target, drafter, num_anchors, num_texts=1)
        scorer = make_scorer(target, drafter, chunk_rows)
        with LivePeak(counts) as live:
            scorer.scores(batch, two_of(drafter))
        return live.peak / (4 * VOCAB * CHUNK)

    for counts, most in ((is_logits, 1), (is_as_wide, MOST)):
        few, many = (peak(num_anchors, CHUNK, counts) for num_anchors in (8, 16))
        assert 1 <= few == many <= most
        assert peak(16, None, counts) >= 64 / CHUNK


def test_without_chunks_the_teacher_is_recalled_once() -> None:
    """Whatever the number of drafts; a chunk's is recalled for each, here of 64 rows in 8 chunks."""
    target = make_target()
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 16, num_texts=1)
    rows: list[int] = []
    hook = target.head.register_forward_hook(lambda *call: rows.append(len(call[-1])))
    for chunk_rows, expected in ((None, [64]), (CHUNK, [CHUNK] * 8 * 2)):
        rows.clear()
        make_scorer(target, drafter, chunk_rows).scores(batch, two_of(drafter))
        assert rows == expected
    hook.remove()


@pytest.mark.slow
@pytest.mark.long
def test_at_a_real_vocabulary_two_chunks_of_logits_are_held() -> None:
    """A training step of 512 rows at 152k tokens, and scores of as many: the student's and the
    teacher's logits are there of 32 rows at a time, 2 x 19 MB in place of 2 x 311 MB."""
    chunk_rows = 32
    target = make_target(QWEN3_VOCAB, std=0.1)
    drafter = make_drafter(target, "eagle3", "plain", torch.float32)
    batch = make_batch(target, drafter, 512 // PATH, num_texts=1)
    assert batch.weights_RNK.count_nonzero() == 512
    loss = make_loss("jensen_shannon")
    trainer = make_trainer(target, drafter, loss=loss, chunk_rows=chunk_rows)
    with LivePeak(is_logits) as stepping:
        trainer.update(batch, Decision(1))
    copy = drafter.clone(torch.float32)
    scorer = AcceptanceScorer(copy, target.head, "hidden", torch.bfloat16, chunk_rows=chunk_rows)
    with LivePeak(is_logits) as scoring:
        serving, candidate = scorer.scores(batch, two_of(drafter))
    assert len(serving) == len(candidate) == 512 // PATH
    chunk = 4 * QWEN3_VOCAB * chunk_rows
    assert chunk <= stepping.peak <= 2 * chunk
    assert chunk <= scoring.peak <= 2 * chunk


# --- what `cosched check` says -------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, CHUNK])
@pytest.mark.parametrize("loss", ["forward_kl", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_the_peak_of_sizes_is_that_of_a_step(
    kind: str, example: str, loss: str, chunk_rows: int | None
) -> None:
    """Counted on the meta device it is what the same rows take when they are computed."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    names = [name for name, _ in drafter.network().named_parameters()]
    module = BatchLoss(drafter, make_loss(loss), target.head, "hidden", chunk_rows=chunk_rows)
    with LivePeak() as live:
        batch = whole_batch(target, drafter, 16)
        module.begin_update(batch)
        module(batch).backward()
    sketch, sizes = sketched(target, drafter)
    sized = whole_batch(sizes, sketch, 16)
    form, chunk = "hidden", chunk_rows
    found = step_peak(sketch, names, make_loss(loss), sizes.head, form, sized, chunk)
    # Attention is counted without its kernel.
    assert 0.98 * live.peak < found < 1.1 * live.peak
    logits = 4 * VOCAB * (chunk_rows or 64)
    assert found > (1 if example == "reduced vocabulary" else 2) * logits


@pytest.mark.parametrize("chunk_rows", [None, CHUNK])
@pytest.mark.parametrize("served_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "example"), DRAFTERS_TO_TEST)
def test_the_peak_of_sizes_is_that_of_scores(
    kind: str, example: str, served_as: torch.dtype, chunk_rows: int | None
) -> None:
    """Of two drafts, as a guard has them scored."""
    target = large_target()
    drafter = make_drafter(target, kind, example, torch.float32)
    scorer = make_scorer(target, drafter, chunk_rows, served_as)
    weights = two_of(drafter)
    with LivePeak() as live:
        scorer.scores(whole_batch(target, drafter, 16), weights)
    sketch, sizes = sketched(target, drafter)
    sized = whole_batch(sizes, sketch, 16)
    form, chunk = "hidden", chunk_rows
    found = scores_peak(sketch, list(weights[0]), served_as, sizes.head, form, sized, chunk)
    assert 0.98 * live.peak < found < 1.1 * live.peak
    logits = 4 * VOCAB * (chunk_rows or 64)
    copies = 4 * sum(w.numel() for w in weights[0].values()) * (served_as != torch.float32)
    assert found > copies + (1 if example == "reduced vocabulary" else 2) * logits


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        pytest.param(
            kind,
            f"zero_stage={stage}",
            marks=pytest.mark.slow if kind != "eagle3" and stage != 1 else (),
        )
        for kind in ("eagle3", "dflash", "pard")
        for stage in (0, 1, 2)
    ]
    + [(kind, "gradient_accumulation_steps=4") for kind in ("eagle3", "pard")],
)
def test_a_run_allocates_what_check_says(kind: str, changed: str) -> None:
    """Within a tenth, from the copy that learns to the second update and a look: DeepSpeed's own included,
    which once was a third more than was said."""
    config = load_config(
        SAMPLED,
        ["arms=[adapted]", f"drafter.kind={kind}", f"drafter.path=tinyworld/{kind}",
         "adapt.guard={kind: shadow, anchors: 16}", "adapt.replay.window=128",
         f"adapt.trainer.{changed}"],
    )  # fmt: skip
    said = footprint(config, *sketch_of(config))
    held = said.trainer_copy + said.first_weights + said.masters + said.moments + said.words
    world = build_world(config)
    drafter = load_drafter(world)
    with LivePeak() as live:
        copy = drafter.clone(torch.float32)
        trainer = build_trainer(config, world.target, copy)
        scorer = build_scorer(config, world.target, copy, "sampled")
        for _ in range(2):  # the moments are there after the first
            live.peak = 0
            trainer.update(batch_of_update(config, world.target, copy), Decision(1))
        updating, live.peak = live.peak, 0
        scorer.scores(batch_of_look(config, world.target, copy), [trainer.weights()])
    assert held + said.step == pytest.approx(updating, rel=0.1)
    assert held + said.scores == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_a_captured_run_allocates_what_check_says(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tenth, with what fills batches up. What stands in for a graph keeps gradients of each of
    the three shapes, and makes them anew; graphs have them in one memory."""
    monkeypatch.setattr(footprint_module, "device_of", lambda _: torch.device("cuda"))
    config = load_config(
        SAMPLED,
        ["arms=[adapted]", f"drafter.kind={kind}", f"drafter.path=tinyworld/{kind}",
         "adapt.replay.window=100", "engine.max_batch=3", "adapt.trainer.cuda_graph=auto"],
    )  # fmt: skip
    said = footprint(config, *sketch_of(config))
    assert said.added - said.beside_sglang == said.within_sglang > said.graphs > said.step == 0
    held = said.trainer_copy + said.first_weights + said.masters + said.moments + said.words
    world = build_world(config)
    drafter = load_drafter(world)
    frames = frames_of(config, world.target, drafter, losses_of(config), "cuda")
    assert frames is not None
    assert frames.sizes == [4, 2, 1]
    with LivePeak() as live:
        copy = drafter.clone(torch.float32)
        names = [name for name, _ in copy.network().named_parameters()]
        module = BatchLoss(copy, losses_of(config)[0], world.target.head, "hidden")
        capture = partial(Captured, record=by_doing)
        trainer = DeepSpeedTrainer(module, names, 0, 1e-3, 1.0, frames=frames, capture=capture)
        for _ in range(2):
            live.peak = 0
            for batch in batches_of_update(config, world.target, copy, frames):
                trainer.update(batch, Decision(1))
    kept = 3 * 4 * said.num_trained
    assert held + said.graphs + kept == pytest.approx(live.peak, rel=0.1)


def whole_batch(target: Any, drafter: Any, num_anchors: int) -> SignalBatch:
    """Of one request, whose features are as the draft wants them; no two teacher rows are alike."""
    limits = ReplayLimits(64, num_anchors, PATH, 1 << 20, 1 << 28, 0, 0)
    rows_0X = torch.empty(0, target.hidden_size, device="meta")
    return full_batch(limits, drafter, target, rows_0X, 1, num_anchors, None)


def sketched(target: Any, drafter: Any) -> tuple[Any, MetaTarget]:
    """Both without weights."""
    sketch, sizes = drafter.clone(torch.float32), MetaTarget(target)
    sketch.network().to("meta")
    sketch._target = sizes
    return sketch, sizes
