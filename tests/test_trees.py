"""Rounds whose drafts are trees: rows and cache, text, who learns, and who shares a batch."""

from __future__ import annotations

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.engines.embedded.tree_rules import Recursive
from cosched.engines.embedded.trees import Forest
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import ForcedVerifier, GreedyVerifier, SamplingVerifier
from cosched.engines.request import GenerationRequest
from cosched.errors import ConfigError
from cosched.loop.lengths import DraftLengths
from cosched.records import Proposal
from cosched.testing.harness import (
    Watcher,
    collected,
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)
from cosched.testing.sampling import FALSE_ALARM, VOCABULARY, p_values, sampling_target
from tests.helpers.drafts import Lookup, make_drafter
from tests.helpers.lengths import ByTurns, Scripted
from tests.helpers.trees import BUSHY, AsTree, BranchingLookup, BranchingTable, as_tensor, rows_of

# --- rows and cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, (9, 4)])
@pytest.mark.parametrize("window", [None, 4])
def test_rows_of_a_tree_are_those_of_each_path_alone(
    counts: tuple[int, ...] | None, window: int | None
) -> None:
    """Logits, hidden states and features of every row, held against its own ancestors in a chain.

    And once a path is kept, the cache is the one that this path alone would have left.
    """
    target = make_target()
    target.window = window
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(1, target.vocab_size, (2, 9), generator=generator)
    ids_BS = torch.randint(1, target.vocab_size, (2, 10), generator=generator)
    forest = Forest.of(Proposal(ids_BS[:, 1:], None, counts, as_tensor(BUSHY, 2)))
    together, starts = target.new_cache(2, 24), [5, 8]
    for slot, start in enumerate(starts):
        at = torch.arange(start)[None]
        target.forward(text_BT[slot : slot + 1, :start], at, together, first_slot=slot)
    ragged = None if counts is None else [count + 1 for count in counts]
    positions_BS = torch.tensor(starts)[:, None] + forest.depths_BS
    rows = target.forward(
        ids_BS, positions_BS, together, (0, 2), counts=ragged, sees_BTT=forest.sees_BSS
    )
    for slot, start in enumerate(starts):
        for row in range((counts or (9, 9))[slot] + 1):
            path = rows_of(BUSHY, row)
            alone = target.new_cache(1, 24)
            target.forward(text_BT[slot : slot + 1, :start], torch.arange(start)[None], alone)
            at = start + torch.arange(len(path))[None]
            own = target.forward(ids_BS[slot, path][None], at, alone, (0, 2))
            for ours, theirs in (
                (rows.logits_BTV, own.logits_BTV),
                (rows.hidden_BTH, own.hidden_BTH),
                (rows.features_BTF, own.features_BTF),
            ):
                assert torch.allclose(ours[slot, row], theirs[0, -1], rtol=1e-4, atol=1e-4)
    path = rows_of(BUSHY, 4)
    together.bring_together(1, starts[1], path)
    target.forward(text_BT[1:2, :8], torch.arange(8)[None], alone)
    target.forward(ids_BS[1, path][None], 8 + torch.arange(len(path))[None], alone)
    for ours, theirs in zip(together.slots, alone.slots, strict=True):
        for own, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            end = starts[1] + len(path)  # sums in another order
            assert torch.allclose(own[1, :, :end], other[0, :, :end], rtol=1e-4, atol=1e-4)


# --- the text ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("verifier", [
    GreedyVerifier(),
    SamplingVerifier(SamplingParams(1.0)),
    SamplingVerifier(SamplingParams(0.7, top_p=0.8), "target_only"),
    SamplingVerifier(SamplingParams(1.0), tree_rule="k_sequential"),
])  # fmt: skip
@pytest.mark.parametrize("with_logits", [True, False])
def test_a_chain_that_is_called_a_tree_says_the_same(
    target: Target, max_batch: int, verifier, with_logits: bool
) -> None:
    """Texts, and the blocks that they came in, from the same random numbers, to the bit."""
    requests = make_requests(target, count=4, prompt=6, new=40)
    found = []
    for wrap in (lambda drafter: drafter, AsTree):
        drafter = make_drafter(target) if with_logits else Lookup(target.vocab_size)
        watcher = Watcher()
        engine = make_engine(
            target, wrap(drafter), requests, max_batch, verifier=verifier, observer=watcher
        )
        texts = decode(engine, requests)
        blocks = [b for round_ in watcher.rounds for b in round_.blocks]
        found.append((texts, [(b.request_id, b.path_K.tolist(), b.num_accepted) for b in blocks]))
    assert found[0] == found[1]


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_greedy_text_is_plain_decodings(target: Target, max_batch: int, ragged: bool) -> None:
    """Trees of tokens alone: some are refused whole, some accepted to a leaf that is no first choice."""
    requests = make_requests(target, count=4, prompt=6, new=80)
    watcher, drafter = Watcher(), BranchingLookup(target.vocab_size, ragged=ragged)
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher)
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    blocks = [block for round_ in watcher.rounds for block in round_.blocks]
    assert {0, 3} <= {block.num_accepted for block in blocks}
    chain = make_engine(target, Lookup(target.vocab_size), requests, observer=(plain := Watcher()))
    decode(chain, requests)
    assert len(watcher.rounds) < len(plain.rounds) or max_batch > 1


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SamplingParams(1.0), SamplingParams(0.7, top_p=0.8)])
@pytest.mark.parametrize("ragged", [False, True])
def test_sampled_text_of_tokens_alone_follows_the_target(
    sampling: SamplingParams, ragged: bool
) -> None:
    """Token by token and jointly, by chi-square against exact probabilities."""
    drafter = BranchingLookup(VOCABULARY, (0, 0, 1, 1, 2), ragged)
    found = p_values(sampling_target(), drafter, SamplingVerifier(sampling), sampling)
    assert min(found) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SamplingParams(1.0), SamplingParams(0.7, top_p=0.8)])
@pytest.mark.parametrize("acceptance", ["sampled", "target_only"])
@pytest.mark.parametrize("tree_rule", ["recursive", "k_sequential"])
def test_sampled_text_of_drawn_trees_follows_the_target(
    sampling: SamplingParams, acceptance, tree_rule
) -> None:
    """The same with distributions, where the shape of a tree follows from what was drawn before."""
    verifier = SamplingVerifier(sampling, acceptance, tree_rule)
    found = p_values(sampling_target(), BranchingTable(VOCABULARY), verifier, sampling)
    assert min(found) > FALSE_ALARM


def test_the_chi_square_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets what was refused before it tries the next of several is caught."""
    monkeypatch.setattr(Recursive, "refuse", lambda self, token: None)
    sampling = SamplingParams(1.0)
    drafter = BranchingLookup(VOCABULARY, (0, 0, 1, 1, 2))
    found = p_values(sampling_target(), drafter, SamplingVerifier(sampling), sampling)
    assert min(found) < 1e-12


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_a_batch_says_what_each_would_alone(target: Target, sampled: bool, table: bool) -> None:
    """Trees of unequal shape in one round disturb each other in nothing."""
    requests = make_requests(target, count=4, prompt=6, new=40)
    verifier = SamplingVerifier(SamplingParams(1.0)) if sampled else GreedyVerifier()
    texts = [
        decode(
            make_engine(
                target,
                BranchingTable(64) if table else BranchingLookup(64, ragged=True),
                requests,
                max_batch,
                verifier=verifier,
            ),
            requests,
        )
        for max_batch in (1, 3)
    ]
    assert texts[0] == texts[1]


# --- how far a tree goes -----------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_trees_go_as_far_as_they_are_told(
    target: Target, max_batch: int, by_request: bool, table: bool
) -> None:
    """By round and by request, none at all included: greedy text stays, and no path is longer."""
    drafter = BranchingTable(64) if table else BranchingLookup(64, ragged=True)
    most = drafter.num_draft_tokens
    script = (most, 0, 1, 2)
    lengths = ByTurns(most) if by_request else DraftLengths(Scripted(*script), most)
    requests = make_requests(target, count=4, prompt=6, new=40)
    watcher = Watcher()
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher, lengths=lengths)
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    rounds = [round_ for round_ in watcher.rounds if round_.blocks]
    for number, round_ in enumerate(rounds):
        told = most if by_request else script[number % len(script)]
        assert all(len(block.path_K) <= told for block in round_.blocks)


def test_sampled_text_follows_the_target_however_far_trees_go() -> None:
    """A tree cut short, request by request, is verified as one that ends there."""
    target, sampling = sampling_target(), SamplingParams(1.0)
    drafter, verifier = BranchingTable(VOCABULARY), SamplingVerifier(sampling)
    found = p_values(target, drafter, verifier, sampling, None, 2000, ByTurns(2))
    assert min(found) > FALSE_ALARM


# --- who learns --------------------------------------------------------------------------------


def test_rows_of_the_path_are_told_and_the_others_are_refused(target: Target) -> None:
    """Of every segment, block and refused token the teacher is what the target says behind its text."""
    requests = make_requests(target, count=3, prompt=6, new=40)
    watcher = Watcher()
    drafter = BranchingLookup(target.vocab_size)
    texts = decode(make_engine(target, drafter, requests, 3, observer=watcher), requests)
    whole = {r.id: torch.cat((r.prompt_P, torch.tensor(texts[r.id]))) for r in requests}
    off_path = 0
    for round_ in watcher.rounds[4::5]:
        for segment, block in zip(round_.segments, round_.blocks, strict=True):
            text_T, start = whole[segment.request_id], segment.start
            end = start + len(segment.tokens_R1)
            assert torch.equal(segment.tokens_R1, text_T[start:end])
            said_TV = logits_of(target, text_T[: end - 1])
            assert_taught(target, segment.teacher_RX, said_TV[start:])
            path_T = torch.cat((text_T[: start + 1], block.path_K))
            assert_taught(target, block.teacher_KX, logits_of(target, path_T)[start:-1])
            if segment.refused is None:
                continue
            number = len(block.path_K) - block.num_accepted
            on_path = segment.refused.teacher_QX[:number]
            assert_taught(
                target, on_path, logits_of(target, path_T)[start + block.num_accepted + 1 :]
            )
            assert len(segment.refused.tokens_Q) == len(BUSHY) - block.num_accepted
            off_path += len(segment.refused.tokens_Q) - number
    assert off_path > 50


def logits_of(target: Target, tokens_T: torch.Tensor) -> torch.Tensor:
    return target.model(input_ids=tokens_T[None]).logits[0]


def assert_taught(target: Target, teacher_RH: torch.Tensor, logits_RV: torch.Tensor) -> None:
    assert torch.allclose(target.head(teacher_RH), logits_RV, atol=1e-3)


def test_what_was_committed_is_learnt_from_as_if_it_had_been_a_chain(target: Target) -> None:
    """Contexts, paths and teacher rows of a text are those that plain rounds leave of it."""
    requests = make_requests(target, count=2, prompt=6, new=60)
    batches = []
    for drafter in (Lookup(target.vocab_size), BranchingLookup(target.vocab_size)):
        watcher = Watcher()
        decode(make_engine(target, drafter, requests, observer=watcher), requests)
        batches.append(collected(target, drafter, "delayed", None, watcher.rounds))
    chain, tree = batches
    # The last round of a request, in which it ends, is of another length: what both have is alike.
    C = int(min(chain.lengths_R.min(), tree.lengths_R.min())) - 4
    for ours, theirs in (
        (tree.tokens_RC1, chain.tokens_RC1),
        (tree.anchors_RN, chain.anchors_RN),
        (tree.paths_RNK, chain.paths_RNK),
        (tree.teacher_RNKX, chain.teacher_RNKX),
    ):
        assert torch.allclose(ours[:, :C].float(), theirs[:, :C].float(), rtol=1e-4, atol=1e-4)


# --- where the text is given -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_given_text_is_led_through_trees(target: Target, kind) -> None:
    """The text comes out as it is, and more of it is accepted than of chains."""
    generator = torch.Generator().manual_seed(1)
    text_T = torch.randint(1, 9, (120,), generator=generator)
    request = GenerationRequest("given", text_T[:8], 112, text_T)
    accepted = []
    for drafter in (Lookup(target.vocab_size), BranchingLookup(target.vocab_size)):
        watcher = Watcher()
        verifier = ForcedVerifier(kind, SamplingParams(1.0))
        engine = make_engine(target, drafter, [request], verifier=verifier, observer=watcher)
        assert decode(engine, [request])["given"] == text_T[8:].tolist()
        accepted.append(sum(b.num_accepted for r in watcher.rounds for b in r.blocks))
    assert accepted[1] > accepted[0] > 0


def test_documents_are_refused(target: Target) -> None:
    """A tree has no measure on text that the target did not say."""
    text_T = torch.arange(1, 40)
    request = GenerationRequest("given", text_T[:8], 31, text_T)
    verifier = ForcedVerifier("document", SamplingParams(1.0))
    engine = make_engine(target, BranchingLookup(64), [request], verifier=verifier)
    with pytest.raises(ConfigError, match=r"workload\.documents"):
        decode(engine, [request])


def test_a_draft_that_learns_beside_trees_of_others(target: Target) -> None:
    """A network that is trained on the rows of trees' paths: text stays, and it is published."""
    requests = make_requests(target, count=3, prompt=6, new=60)
    drafter = make_drafter(target)
    teacher = make_coscheduler(target, drafter, every=3, rows="all", lr=3e-3)
    engine = make_engine(target, AsTree(drafter), requests, 3, observer=teacher)
    assert decode(engine, requests) == decode(make_engine(target, None, requests), requests)
    assert teacher.version > 5
