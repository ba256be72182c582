"""Losses against second derivations, limits and inequalities; weights, chunks and sums.

Gradients against finite differences, for every loss there is, are in the contract
(tests/test_contract.py). Letters: M rows, V vocabulary; R requests, N anchors, K positions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.errors import ConfigError
from cosched.registry import LOSSES
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from losses.divergence import kl
from losses.reduction import acceptance, hardest, reached
from tests.helpers.losses import close, draw, few, gradient, make_loss, some_rows
from tests.helpers.paths import QUICKSTART

SMOOTH_AND_PROPER = ("forward_kl", "reverse_kl", "jensen_shannon")
DIVERGENCES = (*SMOOTH_AND_PROPER, "total_variation", "negative_log_acceptance", "lk_hybrid")
ROW_LOSSES = (
    *DIVERGENCES,
    "hard_cross_entropy",
    "negative_log_target_only",
    "top_k_cross_entropy",
)


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


# --- values, derived a second time ---------------------------------------------------------


@few
@some_rows
def test_values_equal_a_second_derivation(seed: int, vocab: int, scale: float) -> None:
    """From logits through log-sum-exp, from entropies, or from min in place of |p - q|."""
    s, t = draw(seed, vocab, scale)
    p, q = t.softmax(-1), s.softmax(-1)
    lse_s, lse_t = s.logsumexp(-1), t.logsumexp(-1)
    overlap = torch.minimum(p, q).sum(-1)
    forward = (p * (t - s)).sum(-1) - lse_t + lse_s
    weight = torch.exp(-3 * overlap)
    expected = {
        "forward_kl": forward,
        "reverse_kl": (q * (s - t)).sum(-1) - lse_s + lse_t,
        "jensen_shannon": entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2,
        "total_variation": 1 - overlap,
        "negative_log_acceptance": -torch.log1p(-(p - q).abs().sum(-1) / 2),
        "lk_hybrid": weight * forward + (1 - weight) * (p - q).abs().sum(-1) / 2,
        "hard_cross_entropy": lse_s - s.gather(-1, t.argmax(-1, keepdim=True))[:, 0],
        "negative_log_target_only": lse_s + lse_t - (s + t).logsumexp(-1),
    }
    # 1 - |p - q| / 2 cancels where p and q hardly overlap: there the second way is the worse one
    exact = overlap > 1e-3
    for kind, value in expected.items():
        mask = exact if kind == "negative_log_acceptance" else torch.ones_like(exact)
        close(make_loss(kind).rows(s, t)[mask], value[mask])


@few
@some_rows
def test_gradients_equal_their_closed_forms(seed: int, vocab: int, scale: float) -> None:
    """Each derived by hand; those of the LK losses hold only with the acceptance held fixed."""
    s, t = draw(seed, vocab, scale)
    p, q = t.softmax(-1), s.softmax(-1)
    found = {kind: gradient(lambda s, k=kind: make_loss(k).rows(s, t), s) for kind in ROW_LOSSES}
    log_ratio = s.log_softmax(-1) - t.log_softmax(-1)
    close(found["forward_kl"], q - p)
    close(found["reverse_kl"], q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True)))
    above = (q > p).double()
    variation = q * (above - (q * above).sum(-1, keepdim=True))
    close(found["total_variation"], variation)
    alpha = torch.minimum(p, q).sum(-1, keepdim=True)
    close(found["negative_log_acceptance"] * alpha, variation)
    weight = torch.exp(-3 * alpha)
    close(found["lk_hybrid"], weight * (q - p) + (1 - weight) * variation)
    certain = torch.nn.functional.one_hot(t.argmax(-1), vocab)
    close(found["hard_cross_entropy"], q - certain)
    accepted = p * q / (p * q).sum(-1, keepdim=True)  # what was drafted, once it has been accepted
    close(found["negative_log_target_only"], q - accepted)
    sharp = make_loss("negative_log_target_only", sharpness=3.0)
    q = (3 * s).softmax(-1)
    accepted = p * q / (p * q).sum(-1, keepdim=True)
    close(gradient(lambda s: sharp.rows(s, t), s), 3 * (q - accepted))


@few
@some_rows
def test_top_k_equals_its_groups_one_by_one(seed: int, vocab: int, scale: float) -> None:
    """The k best tokens and one bucket, written out; the bucket's gradient is shared by q."""
    s, t = draw(seed, vocab, scale)
    p, q = t.softmax(-1), s.softmax(-1)
    for k in range(1, vocab):
        loss = make_loss("top_k_cross_entropy", k=k)
        found, slope = loss.rows(s, t), gradient(lambda s, loss=loss: loss.rows(s, t), s)
        for m in range(len(s)):
            order = p[m].argsort(descending=True)
            best, tail = order[:k], order[k:]
            expected = -(p[m, best] * q[m, best].log()).sum()
            expected = expected - p[m, tail].sum() * q[m, tail].sum().log()
            close(found[m], expected)
            close(slope[m, best], (q - p)[m, best])
            close(slope[m, tail], q[m, tail] * (1 - p[m, tail].sum() / q[m, tail].sum()))


# --- what holds at equality, near it, and far from it --------------------------------------


@few
@some_rows
def test_divergences_are_zero_at_equality_only(seed: int, vocab: int, scale: float) -> None:
    s, t = draw(seed, vocab, max(scale, 0.1))
    for kind in DIVERGENCES:
        assert make_loss(kind).rows(t, t).abs().max() < 1e-12
        assert make_loss(kind).rows(s, t).min() > 0


@few
@some_rows
def test_top_k_agrees_with_the_whole_vocabulary_as_k_grows(
    seed: int, vocab: int, scale: float
) -> None:
    """What it is above its least grows with k, up to the KL; at k = V it is the cross-entropy."""
    s, t = draw(seed, vocab, scale)
    excess = []
    for k in range(1, vocab + 1):
        loss = make_loss("top_k_cross_entropy", k=k)
        excess.append(loss.rows(s, t) - loss.rows(t, t))
    whole = make_loss("forward_kl").rows(s, t)
    close(excess[-1], whole)
    close(loss.rows(s, t), whole + entropy(t.softmax(-1)))
    assert bool((torch.stack(excess).diff(dim=0) > -1e-11).all())


@few
@some_rows
def test_inequalities_between_losses(seed: int, vocab: int, scale: float) -> None:
    """Pinsker both ways; -log(1 - x) >= x; Jensen-Shannon between TV^2 / 2 and TV log 2."""
    s, t = draw(seed, vocab, scale)
    value = {kind: make_loss(kind).rows(s, t) for kind in DIVERGENCES}
    tv, slack = value["total_variation"], 1e-12
    assert bool((tv <= (value["forward_kl"] / 2).sqrt() + slack).all())
    assert bool((tv <= (value["reverse_kl"] / 2).sqrt() + slack).all())
    assert bool((value["negative_log_acceptance"] >= tv - slack).all())
    assert bool((value["jensen_shannon"] >= tv**2 / 2 - slack).all())
    assert bool((value["jensen_shannon"] <= tv * math.log(2) + slack).all())


def test_near_equality_the_kls_agree_and_jensen_shannon_is_a_quarter() -> None:
    """All three are the Fisher metric there; the third order, 1e-3 of it here, tells them apart."""
    s, t = draw(0, 9, 1.0)
    forward, reverse, jensen = (make_loss(k).rows(t + 1e-3 * s, t) for k in SMOOTH_AND_PROPER)
    torch.testing.assert_close(reverse, forward, rtol=5e-3, atol=0)
    torch.testing.assert_close(4 * jensen, forward, rtol=5e-3, atol=0)


def test_far_apart_only_some_still_teach() -> None:
    """60 nats apart bounded values reach their bounds, and they and reverse KL lose their gradient."""
    teacher = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 60.0, 0.0]], dtype=torch.float64)
    value = {kind: float(make_loss(kind).rows(student, teacher)) for kind in DIVERGENCES}
    slope = {
        kind: float(gradient(lambda s, k=kind: make_loss(k).rows(s, teacher), student).abs().max())
        for kind in DIVERGENCES
    }
    assert value["total_variation"] == pytest.approx(1)
    assert value["jensen_shannon"] == pytest.approx(math.log(2))
    # The overlap is e^-60 at each of the three tokens.
    assert value["negative_log_acceptance"] == pytest.approx(60 - math.log(3), abs=1e-9)
    assert value["forward_kl"] == pytest.approx(60)
    vanished = {kind for kind in DIVERGENCES if slope[kind] < 1e-20}
    assert vanished == {"reverse_kl", "jensen_shannon", "total_variation"}
    assert all(slope[kind] > 0.3 for kind in ("forward_kl", "negative_log_acceptance", "lk_hybrid"))


@few
@some_rows
def test_limits_of_the_lk_losses(seed: int, vocab: int, scale: float) -> None:
    """Hybrid: KL at eta 0, TV as eta grows. Log-acceptance: cross-entropy at a certain teacher."""
    s, t = draw(seed, vocab, scale)
    close(make_loss("lk_hybrid", eta=0).rows(s, t), make_loss("forward_kl").rows(s, t))
    near = acceptance(s, t) > 1e-3
    many = make_loss("lk_hybrid", eta=1e6).rows(s, t)
    close(many[near], make_loss("total_variation").rows(s, t)[near])
    certain = 1e3 * torch.nn.functional.one_hot(t.argmax(-1), vocab).double()
    expected = make_loss("hard_cross_entropy").rows(s, certain)
    close(make_loss("negative_log_acceptance").rows(s, certain), expected)


@few
@some_rows
def test_limits_of_the_target_only_loss(seed: int, vocab: int, scale: float) -> None:
    """Sharp: the chance of the best token, up to its lead over the next; flat: that of any token.

    At a certain teacher it is the cross-entropy. By it rows are weighed too: p of the best token.
    """
    s, t = draw(seed, vocab, scale)
    p = t.softmax(-1)
    best = p.gather(-1, s.argmax(-1, keepdim=True))[:, 0]
    first, second = s.topk(2, -1).values.unbind(-1)
    led = first - second > 1e-3
    sharp = make_loss("negative_log_target_only", sharpness=1e6).rows(s, t)
    close(sharp[led], -best.log()[led])
    flat = make_loss("negative_log_target_only", sharpness=1e-14).rows(s, t)
    close(flat, torch.full_like(flat, math.log(vocab)))
    loss = make_loss("negative_log_target_only")
    certain = 1e3 * torch.nn.functional.one_hot(t.argmax(-1), vocab).double()
    close(loss.rows(s, certain), make_loss("hard_cross_entropy").rows(s, certain))
    close(loss.accepted(s, t), best)


def test_the_target_only_loss_takes_one_of_two_tokens_that_overlap_does_not() -> None:
    """What it is for: of a row with two even tokens the draft can only propose one, with half of p.

    The overlap is the same wherever the draft puts its mass on both; this loss wants it on one.
    """
    teacher = torch.tensor([[0.0, 0.0, -30.0]], dtype=torch.float64)
    even, one = teacher.clone(), torch.tensor([[9.0, 0.0, -30.0]], dtype=torch.float64)
    loss = make_loss("negative_log_target_only")
    assert float(loss.rows(one, teacher)) == pytest.approx(float(loss.rows(even, teacher)))
    tilted = torch.tensor([[0.1, 0.0, -30.0]], dtype=torch.float64)  # p prefers the first a little
    assert float(loss.rows(one, tilted)) < float(loss.rows(even, tilted))
    overlap = make_loss("negative_log_acceptance")
    assert float(overlap.rows(one, tilted)) > float(overlap.rows(even, tilted))


# --- weights of rows -----------------------------------------------------------------------


def blocks(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits ``[R, N, K, V]`` and row weights with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 3, 4, 7, dtype=torch.float64, generator=generator).unbind()
    weights = torch.ones(2, 3, 4, dtype=torch.float64)
    weights[0, 1] = weights[1, 2, 2:] = 0
    return student, teacher, weights


def test_reached_is_the_product_of_the_acceptances_before() -> None:
    assert reached(torch.tensor([[[0.5, 0.25, 0.1]]])).flatten().tolist() == [1.0, 0.5, 0.125]


def test_hardest_keeps_its_share_of_the_rows_that_count() -> None:
    """A share of 0.5 of five rows is three; what a row of weight zero holds is not looked at."""
    weights = torch.tensor([[[1.0, 0.0, 0.5, 1.0, 1.0, 1.0]]])
    gap = torch.tensor([[[0.1, math.nan, 0.3, 0.9, 0.2, 0.0]]])
    assert hardest(weights, gap, 0.5).flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    assert torch.equal(hardest(weights, gap, 1.0), weights)
    assert int((hardest(weights, gap, 1e-3) > 0).sum()) == 1


def test_shares_cut_the_gap_at_both_ends() -> None:
    """Of five rows that count: the easiest three, the hardest four, and the two in both."""
    weights = torch.tensor([[[1.0, 0.0, 0.5, 1.0, 1.0, 1.0]]])
    alpha = torch.tensor([[[0.9, math.nan, 0.7, 0.1, 0.8, 1.0]]])

    def kept(**own: float) -> list[float]:
        loss = make_loss("forward_kl", position_decay=1, **own)
        return loss.weights(alpha, weights).flatten().tolist()

    assert kept(easiest_share=0.5) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert kept(hardest_share=0.7) == [1.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    assert kept(easiest_share=0.5, hardest_share=0.7) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["{kind: forward_kl", "{kind: sum, terms: [{kind: forward_kl}]"])
def test_shares_without_a_common_row_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"adapt\.loss: hardest_share 0\.5 .*must be above 1"):
        with_loss(kind + ", hardest_share: 0.5, easiest_share: 0.5}")


@pytest.mark.parametrize("own", [{"acceptance_prefix": True}, {"hardest_share": 0.4}])
def test_weights_of_rows_are_held_fixed(own: dict[str, Any]) -> None:
    """Value and gradient are those of the same weights given from outside."""
    student, teacher, weights = blocks()
    loss, plain = make_loss("forward_kl", **own), make_loss("forward_kl", position_decay=1)
    seen = loss.weights(acceptance(student, teacher), weights)
    assert not seen.requires_grad
    assert not torch.equal(seen, make_loss("forward_kl").weights(None, weights))
    assert not seen[weights == 0].any()
    torch.testing.assert_close(loss(student, teacher, weights), plain(student, teacher, seen))
    found = gradient(lambda s: loss(s, teacher, weights), student)
    torch.testing.assert_close(found, gradient(lambda s: plain(s, teacher, seen), student))


@pytest.mark.parametrize("own", [{"acceptance_prefix": True}, {"hardest_share": 0.4}])
def test_masked_rows_do_not_reach_the_weights(own: dict[str, Any]) -> None:
    """Not a number in a masked row leaves the weights of the others as they are."""
    student, teacher, weights = blocks()
    weights[0, 0, 1] = 0  # masked in the middle of a path
    loss = make_loss("forward_kl", **own)
    expected = loss(student, teacher, weights)
    student[weights == 0] = math.nan
    assert torch.equal(loss(student, teacher, weights), expected)


# --- sums ----------------------------------------------------------------------------------


def with_loss(loss: str) -> Config:
    return load_config(QUICKSTART, [f"adapt.loss={loss}"])


def test_a_sum_is_the_sum_of_its_terms() -> None:
    """Read from YAML, in value and gradient, with row weights applied once."""
    config = with_loss(
        "{kind: sum, position_decay: 0.5, terms: [{kind: forward_kl}, "
        "{kind: total_variation, weight: 0.5}, {kind: top_k_cross_entropy, k: 3, weight: 2}]}"
    )
    loss = LOSSES.get("sum")(config.loss_settings)
    student, teacher, weights = blocks()
    terms = [
        (1.0, make_loss("forward_kl", position_decay=0.5)),
        (0.5, make_loss("total_variation", position_decay=0.5)),
        (2.0, make_loss("top_k_cross_entropy", k=3, position_decay=0.5)),
    ]

    def expected(student: Tensor) -> Tensor:
        return torch.stack([w * term(student, teacher, weights) for w, term in terms]).sum()

    close(loss(student, teacher, weights), expected(student))
    close(gradient(lambda s: loss(s, teacher, weights), student), gradient(expected, student))


def test_a_sum_survives_being_written_out(tmp_path: Path) -> None:
    config = with_loss("{kind: sum, terms: [{kind: lk_hybrid, eta: 2, weight: 0.25}]}")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml").loss_settings == config.loss_settings


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("[]", r"\.terms: .*>= 1"),
        ("[{kind: forward_kl, weight: 0}]", "sum to zero"),
        ("[{kind: forward_kl, weight: .inf}]", r"terms\[0\]\.weight: a finite number .*got inf"),
        ("[{kind: forward_kl, weight: -1}]", r"terms\[0\]\.weight: .*>= 0"),
        ("[{weight: 1}]", r"terms\[0\]: `kind` is required"),
        ("[{kind: forward_kl}, {kind: nonsense}]", r"terms\[1\]: .*there are: .*reverse_kl"),
        ("[{kind: lk_hybrid, eta: much}]", r"terms\[0\]\.eta: "),
        ("[{kind: lk_hybrid, etta: 1}]", r"terms\[0\]: .*'etta'.*allowed here: eta"),
        ("[{kind: forward_kl, position_decay: 1}]", r"position_decay.*beside `terms`"),
        ("[{kind: sum, terms: [{kind: top_k_cross_entropy, k: 0}]}]", r"terms\[0\]\.k: .*>= 1"),
    ],
)
def test_terms_that_are_not_allowed_are_named(terms: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^adapt.loss.*{message}"):
        with_loss(f"{{kind: sum, terms: {terms}}}")


def test_more_best_tokens_than_the_vocabulary_are_refused() -> None:
    """How large the draft's vocabulary is shows at the first call only."""
    student, teacher, weights = blocks()
    with pytest.raises(ConfigError, match=r"adapt\.loss: k = 8 .*the 7 tokens.*at most 7"):
        make_loss("top_k_cross_entropy", k=8)(student, teacher, weights)


def test_kl_of_log_probabilities_with_an_empty_token_is_finite() -> None:
    """A teacher that gives a token nothing: its term is 0 log 0 = 0, up to float32's smallest."""
    log_p = torch.tensor([[0.0, -1e4]])
    assert kl(log_p, torch.tensor([[-1.0, -0.5]])).item() == pytest.approx(1.0)
