"""Teacher rows of the form ``top_k``: what is kept, what is made of it, and that it teaches.

Letters: M rows, V vocabulary, k best tokens, X record.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verifiers import GreedyVerifier
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.errors import ConfigError
from cosched.loop.teacher_rows import pack_best, record_width, unpack_best
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import SignalBatch, TeacherForm, VerifyRound
from cosched.settings.load import load_config
from cosched.testing.harness import Watcher, collected, decode, make_requests
from cosched.training.micro_step import BatchLoss
from losses.divergence import kl
from tests.helpers.drafts import make_drafter
from tests.helpers.losses import draw, few, make_loss, some_rows
from tests.helpers.paths import QUICKSTART

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # records are in float32


@few
@some_rows
def test_a_record_keeps_the_best_and_the_mass_of_the_rest(
    seed: int, vocab: int, scale: float
) -> None:
    """Probabilities of the k best are the row's own; the others have their sum, all alike."""
    _, teacher = draw(seed, vocab, scale)
    p = teacher.softmax(-1)
    for k in range(1, vocab + 1):
        records = pack_best(teacher, k)
        assert records.shape[-1] == record_width(k)
        found = unpack_best(records, vocab).double().softmax(-1)
        order = p.argsort(-1, descending=True)
        best, rest = order[:, :k], order[:, k:]
        torch.testing.assert_close(found.gather(-1, best), p.gather(-1, best), **ROUNDING)
        if k < vocab:
            others = found.gather(-1, rest)
            even = p.gather(-1, rest).mean(-1, keepdim=True).expand_as(others)
            torch.testing.assert_close(others, even, **ROUNDING)


@few
@some_rows
def test_it_agrees_with_the_whole_row_as_k_grows(seed: int, vocab: int, scale: float) -> None:
    """KL to the whole row falls with every token kept, to nothing; TV stays below the tail's mass."""
    _, teacher = draw(seed, vocab, scale)
    log_p = teacher.log_softmax(-1)
    apart = []
    for k in range(1, vocab + 1):
        log_kept = unpack_best(pack_best(teacher, k), vocab).double().log_softmax(-1)
        apart.append(kl(log_p, log_kept))
        tail = 1 - log_p.exp().topk(k, -1).values.sum(-1)
        variation = (log_p.exp() - log_kept.exp()).abs().sum(-1) / 2
        assert bool((variation <= tail + 1e-5).all())
    assert bool((torch.stack(apart).diff(dim=0) < 1e-5).all())
    assert apart[-1].abs().max() < 1e-5


@few
@some_rows
def test_a_bucket_of_the_rest_is_exact(seed: int, vocab: int, scale: float) -> None:
    """Top-k cross-entropy of as many tokens, or fewer, is what it is on the whole row."""
    student, teacher = draw(seed, vocab, scale)
    for k in range(1, vocab + 1):
        kept = unpack_best(pack_best(teacher, k), vocab).double()
        for fewer in {1, k}:
            loss = make_loss("top_k_cross_entropy", k=fewer)
            torch.testing.assert_close(loss.rows(student, kept), loss.rows(student, teacher), **ROUNDING)  # fmt: skip


def test_a_certain_row_keeps_its_tail() -> None:
    """A mass of e^-60 outside of the best, which one less the sum of the best would lose."""
    row = torch.tensor([[60.0, 0.0, -1.0, -2.0]])
    found = unpack_best(pack_best(row, 1), 4).log_softmax(-1)
    expected = row.log_softmax(-1)[:, 1:].logsumexp(-1)
    torch.testing.assert_close(found[:, 1:].logsumexp(-1), expected)


def test_ids_of_a_large_vocabulary_are_exact() -> None:
    """Tokens of 152 thousand, kept as float32."""
    logits = torch.randn(2, 152_000, generator=torch.Generator().manual_seed(0))
    ids = pack_best(logits, 64)[..., 64:128].long()
    assert torch.equal(ids, logits.topk(64, -1).indices)


def rounds_with(target: Target, form: TeacherForm, k: int) -> list[VerifyRound]:
    drafter, requests = make_drafter(target), make_requests(target, count=2, prompt=9, new=60)
    longest, watcher = max(request.max_length for request in requests), Watcher()
    engine = EmbeddedEngine(
        rows=LiveRows(target, 2, longest + 4, drafter.signal.feature_layers),
        verifier=GreedyVerifier(),
        drafter=drafter,
        options=EngineOptions(2, longest, 0, frozenset(), teacher=form, teacher_top_k=k),
        device=target.device,
        observer=watcher,
    )
    decode(engine, requests)
    return watcher.rounds


def whole_logits(
    target: Target, form: TeacherForm, k: int = 1, vocab: int | None = None
) -> tuple[Tensor, Tensor | None, SignalBatch]:
    """Teacher logits and lost mass of a replayed batch, through ``BatchLoss``."""
    drafter = make_drafter(target)
    batch = collected(target, drafter, "delayed", None, rounds_with(target, form, k))
    assert batch is not None
    if vocab is not None:
        drafter.target_ids = lambda: torch.arange(0, target.vocab_size, 3)[:vocab]
    module = BatchLoss(drafter, make_loss("forward_kl"), target.head, form)
    module.begin_update(batch)
    return module.teacher_logits(batch), module.lost_mass, batch


@pytest.mark.parametrize("vocab", [None, 20])
def test_an_engine_s_records_teach_what_its_logits_do(target: Target, vocab: int | None) -> None:
    """With k = V to rounding, lost mass included; with fewer the best agree and the rest is even."""
    logits, lost, _ = whole_logits(target, "logits", vocab=vocab)
    found, found_lost, batch = whole_logits(target, "top_k", target.vocab_size, vocab)
    counts = batch.weights_RNK > 0
    assert counts.any()
    torch.testing.assert_close(found[counts], logits[counts])
    assert (lost is None) == (vocab is None)
    if lost is not None:
        torch.testing.assert_close(found_lost, lost)
    fewer, fewer_lost, batch = whole_logits(target, "top_k", 8, vocab)
    assert batch.teacher_RNKX.shape[-1] == 17
    if lost is None:
        assert torch.equal(fewer[counts].argmax(-1), logits[counts].argmax(-1))
    else:
        assert 0 < float((fewer_lost - lost).abs()) < 0.2


def test_a_batch_of_records_has_a_gradient(target: Target) -> None:
    """The same as on rows that were unpacked before, chunk by chunk."""
    _, _, batch = whole_logits(target, "top_k", 8)
    drafter = make_drafter(target).clone(torch.float32)
    drafter.network().requires_grad_(True)
    slopes = []
    unpacked = replace(batch, teacher_RNKX=unpack_best(batch.teacher_RNKX, target.vocab_size))
    for form, rows, chunk_rows in (("top_k", batch, 7), ("logits", unpacked, None)):
        loss = make_loss("forward_kl")
        module = BatchLoss(drafter, loss, target.head, form, chunk_rows=chunk_rows)
        slopes.append(torch.autograd.grad(module(rows), drafter.network().fc.weight)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


# --- settings ------------------------------------------------------------------------------


def test_what_a_record_takes_is_counted(tinyworld: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(QUICKSTART.parents[1])
    overrides = ["adapt.replay.teacher=top_k", "adapt.replay.teacher_top_k=16"]
    config = load_config(QUICKSTART, overrides)
    assert footprint(config, *sketch(config)).teacher_bytes_per_row == 4 * 33
    config = load_config(QUICKSTART, [overrides[0], "adapt.replay.teacher_top_k=1000000"])
    with pytest.raises(ConfigError, match=r"adapt\.replay\.teacher_top_k: 1000000 .*vocabulary"):
        footprint(config, *sketch(config))


@pytest.mark.parametrize("form", ["top_k", "logits"])
def test_sglang_has_hidden_states_only(form: str) -> None:
    config = load_config(
        QUICKSTART.parent / "sglang_tiny_cpu.yaml", [f"adapt.replay.teacher={form}"]
    )
    with pytest.raises(ConfigError, match=rf"adapt\.replay\.teacher: '{form}' .*use 'hidden'"):
        check_servable(config)
