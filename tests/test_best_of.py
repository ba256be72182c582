"""Best of several drafters: how one is chosen, from what it is judged, and what it comes to in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from msgspec import convert

from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import ForcedVerifier
from cosched.engines.request import GenerationRequest
from cosched.errors import ConfigError
from cosched.protocols import MOST_UNDRAFTED
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config, to_yaml
from cosched.testing.harness import decode, make_engine, make_requests
from cosched.testing.specimen import as_batch, contract_target, make_texts
from drafters.best_of import BestOfDrafter
from drafters.best_of.record import EXPLORED, Record
from tests.helpers.cli import run_cli
from tests.helpers.drafts import Lookup, make_drafter
from tests.helpers.experiments import write

K = 4
COSTS = [0.3, 0.0]  # of a model and of a copy


class Game:
    """A request whose tokens are their own positions, and how many drafts of each are accepted."""

    def __init__(self) -> None:
        self.record = Record(2, 0, K)
        self.record.length = 9

    def play(self, model: int, copy: int, number: int = K, costs: list[float] = COSTS) -> int:
        """A round: who drafts, and then the text goes on."""
        taken, end = self.record.choose(number, costs), self.record.length
        right = range(end, end + min(copy, number))
        self.record.propose({1: [*right, *[0] * (number - len(right))]}, 0 if taken else number)
        accepted = min(number, copy if taken else model)
        self.record.observe(range(end, end + accepted + 1))
        return taken


def test_a_request_begins_with_the_model() -> None:
    assert Game().play(1, 1) == 0


def test_a_copy_is_judged_while_the_model_drafts() -> None:
    """It is taken once the text has borne out what it proposed, though none of it was verified."""
    game = Game()
    assert [game.play(model=0, copy=K) for _ in range(8)] == [0, *[1] * 7]


def test_a_copy_that_was_right_is_left_when_it_is_wrong() -> None:
    """Text is copied in runs: one wrong proposal ends one, although the copy was right ten times."""
    game = Game()
    for _ in range(40):  # what is known of both, while nothing is copied
        game.play(model=2, copy=0)
    assert [game.play(model=2, copy=K) for _ in range(10)][-6:] == [1] * 6
    assert game.play(model=2, copy=0) == 1
    assert game.play(model=2, copy=0) == 0


def test_what_drafting_costs_counts() -> None:
    """Three tokens at the price of four rounds are not worth it, and at a third of one they are."""
    for cost, expected in ((0.3, 0), (4.0, 1)):
        game = Game()
        taken = [game.play(model=3, copy=1, costs=[cost, 0.0]) for _ in range(80)]
        assert taken[-20:].count(expected) >= 19


def test_a_model_that_has_learnt_is_found_out() -> None:
    """Behind a copy that is right it is tried now and then; here from one round to the next."""
    game = Game()
    for _ in range(100):
        game.play(model=0, copy=2)
    taken = [game.play(model=4, copy=2) for _ in range(2000)]
    assert taken[-1000:].count(0) > 900


def test_a_hopeless_model_costs_no_more_than_its_share() -> None:
    """Of what the copy commits alone; trying it once more counts in full."""
    game = Game()
    for _ in range(100):
        game.play(model=0, copy=2)
    tries = [game.play(model=0, copy=2) for _ in range(2000)].count(0)
    lost = 3 * 1.3 - 1  # three tokens a round, and a third more time, for one token
    assert 0 < tries * lost <= EXPLORED * 3 * 2000 + lost


def test_fewer_tokens_are_judged_as_what_they_are() -> None:
    """Of rounds that drafted one token, all accepted, nothing is known against the second."""
    game = Game()
    for _ in range(30):
        game.play(model=K, copy=0, number=1)
    assert game.record._expected(0, K) > 0.9 * K


# --- the drafter -----------------------------------------------------------------------------


class Features(Lookup):
    """A copy that asks for features, and has a look at whether they are those."""

    seen: torch.Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.signal = SignalSpec((3, 1), "none")

    def observe(self, state, slot, segment) -> None:
        self.seen = segment.features_RF
        super().observe(state, slot, segment)


def test_each_is_given_the_features_that_it_asked_for(target: Target) -> None:
    """In its own order, whoever else asked for what; and replay is the model's, to the bit."""
    model, copy = make_drafter(target), Features(target.vocab_size)
    both = BestOfDrafter([("copy", copy), ("eagle3", model)], target, 3)
    assert both.signal.feature_layers == (0, 1, 2, 3)
    texts, own = make_texts(target, both, 2, 32), make_texts(target, model, 2, 32)
    asked = make_texts(target, copy, 1, 32)[0]
    state = both.new_state(1, 64, None)
    both.observe(state, 0, Segment("r", 0, texts[0].tokens_T, texts[0].features_TF[:-1], None))
    assert torch.equal(copy.seen, asked.features_TF[:-1])
    anchors = torch.tensor([[5, 9], [7, 20]])
    expected = model.replay(as_batch(own, anchors, 3, None))
    assert torch.equal(both.replay(as_batch(texts, anchors, 3, None)), expected)
    clone = both.clone(torch.float32)
    assert torch.equal(clone.replay(as_batch(texts, anchors, 3, None)), expected)
    assert clone.network() is not model.network()
    assert both.scopes() == model.scopes()


def rounds(target: Target, drafter, requests, max_batch: int = 1) -> int:
    engine = make_engine(target, drafter, requests, max_batch)
    return sum(len(one.rounds) for one in engine.generate(requests))


@pytest.mark.slow
@pytest.mark.long
def test_it_is_about_as_good_as_the_better_of_its_parts() -> None:
    """In rounds, over requests where now one and now the other is better.

    A request costs a few rounds to find out; five per cent are allowed for that, of about a hundred
    rounds each.
    """
    target = contract_target()
    requests = make_requests(target, count=4, prompt=9, new=400)
    alone = {}
    for kind in ("ngram", "logitspec"):
        cls = DRAFTERS.get(kind)
        alone[kind] = cls.load(convert({"kind": kind}, cls.Settings), target)
    both = BestOfDrafter(list(alone.items()), target, 3)
    found = rounds(target, both, requests)
    each = {kind: rounds(target, one, requests) for kind, one in alone.items()}
    assert found <= 1.05 * min(each.values()), each


class AllKnowing(Lookup):
    """A copy that knows the text, and is always right."""

    def __init__(self, text: list[int]) -> None:
        super().__init__(64)
        self.text = text

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> list[int]:
        return [0] * max_batch

    def observe(self, state, slot, segment) -> None:
        state[slot] = segment.start + len(segment.tokens_R1)

    def propose(self, state, num_slots, choose, num_draft_tokens):
        ahead = [self.text[at : at + num_draft_tokens] for at in state[:num_slots]]
        return Proposal(torch.tensor([one + [0] * (num_draft_tokens - len(one)) for one in ahead]))


def test_a_model_that_never_drafts_does_not_fall_behind(target: Target) -> None:
    """What it has not taken in stays below the rounds that a drafter is promised."""
    requests = make_requests(target, count=1, prompt=9, new=900)
    (text,) = decode(make_engine(target, None, requests), requests).values()
    model = make_drafter(target)
    most, took = 0, model.propose

    def propose(state, num_slots, choose, number):
        nonlocal most
        most = max(most, len(state.rows[0]))
        return took(state, num_slots, choose, number)

    model.propose = propose
    known = AllKnowing(requests[0].prompt_P.tolist() + text)
    both = BestOfDrafter([("eagle3", model), ("known", known)], target, 3, [1000.0, 0.0])
    assert decode(make_engine(target, both, requests), requests) == {"r0": text}
    assert 64 < most <= MOST_UNDRAFTED


@pytest.mark.parametrize("kind", ["greedy", "sampled", "document"])
def test_along_a_given_text_a_batch_says_that_text(target: Target, kind: str) -> None:
    """A model is led along it and a copy is not; both in one batch, each accepted by its own tokens."""
    requests = make_requests(target, count=3, prompt=9, new=48)
    said = decode(make_engine(target, None, requests), requests)
    forced = [
        replace(one, forced_T=torch.cat((one.prompt_P, torch.tensor(said[one.id]))))
        for one in requests
    ]
    verifier = ForcedVerifier(kind, SamplingParams(0.0 if kind == "greedy" else 1.0))
    both = BestOfDrafter.examples(target, 3)["chain"]
    both.network().requires_grad_(False)
    engine = make_engine(target, both, forced, 3, verifier=verifier)
    assert decode(engine, forced) == said


# --- settings ----------------------------------------------------------------------------------


def of_two(settings: dict, tinyworld: Path, *parts: dict, **more) -> dict:
    """An experiment with EAGLE-3 and n-gram lookup, or others."""
    own = [{"kind": "eagle3", "path": str(tinyworld / "eagle3")}, {"kind": "ngram"}]
    drafters = list(parts) or own
    settings["drafter"] = {"kind": "best_of", "drafters": drafters, "window": 48, **more}
    return settings


@pytest.mark.slow
@pytest.mark.long
def test_a_run_learns_what_its_network_lacks(
    settings: dict, tmp_path: Path, tinyworld: Path
) -> None:
    """Text is plain's, the network is trained, and what is saved are the checkpoints of each."""
    path = write(tmp_path, of_two(settings, tinyworld))
    code, out, err = run_cli("run", "-c", path)
    assert code == 0, out + err
    folder = tmp_path / "runs" / "one"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert {arm["lossless_mismatches"] for arm in arms.values()} == {0}
    assert arms["adapted"]["updates"] > 0
    assert arms["frozen"]["tau"] > 1.1
    saved = folder / "checkpoints" / "adapted"
    part = {"kind": "eagle3", "path": str(saved / "0-eagle3")}
    again = of_two(settings, tinyworld, part, {"kind": "ngram", "path": str(saved / "1-ngram")})
    assert run_cli("check", "-c", write(tmp_path, again))[0] == 0
    written = load_config(folder / "config.yaml")
    assert to_yaml(written) == (folder / "config.yaml").read_text()


def test_what_is_not_said_goes_by_the_network(
    settings: dict, tmp_path: Path, tinyworld: Path
) -> None:
    """A copy that stands first changes nothing of how the network is trained."""
    own = yaml.safe_load(to_yaml(load_config(write(tmp_path, settings))))
    copy, network = {"kind": "ngram"}, dict(settings["drafter"])
    del network["window"]
    config = load_config(write(tmp_path, of_two(settings, tinyworld, copy, network)))
    assert yaml.safe_load(to_yaml(config))["adapt"] == own["adapt"]


@pytest.mark.parametrize(
    ("parts", "more", "message"),
    [
        ([{"kind": "ngram"}], {}, r"drafter\.drafters: .*length >= 2"),
        (
            [{"kind": "ngram"}, {"kind": "none"}],
            {},
            r"drafter\.drafters\[1\]\.kind: unknown drafter",
        ),
        ([{"kind": "ngram"}, {"path": "x"}], {}, r"drafter\.drafters\[1\]\.kind: the name of a"),
        ([{"kind": "ngram"}, {"kind": "eagle3"}], {}, r"drafter\.drafters\[1\].*`path`"),
        ([{"kind": "ngram", "max": 1}, {"kind": "ngram"}], {}, r"drafters\[0\].*`max`.*max_ngram"),
        ([{"kind": "ngram", "window": 9}] * 2, {}, r"drafters\[0\]\.window: .*use drafter\.window"),
        ([{"kind": "ngram"}] * 2, {"path": "x"}, r"drafter: path: each of its drafters has one"),
        ([{"kind": "ngram"}] * 2, {"costs": [-1, 0]}, r"drafter\.costs\[0\]: .*>= 0"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(
    settings: dict, tmp_path: Path, tinyworld: Path, parts: list, more: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, of_two(settings, tinyworld, *parts, **more)))


def test_one_of_these_in_another_is_refused(
    settings: dict, tmp_path: Path, tinyworld: Path
) -> None:
    inner = {"kind": "best_of", "drafters": [{"kind": "ngram"}] * 2}
    with pytest.raises(ConfigError, match=r"drafters\[1\]\.kind: best_of is made of drafters"):
        load_config(write(tmp_path, of_two(settings, tinyworld, {"kind": "ngram"}, inner)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "drafter.drafters: eagle3 and dflash each draft with a model"),
        ({"costs": [0.1]}, "drafter.costs: one for each of 2 drafters, got 1"),
        ({"path": "nowhere"}, "drafter.drafters[0].path: nothing at nowhere"),
        (
            {"top_k": 2},
            "drafter.drafters: eagle3 drafts trees, and what is chosen among are chains",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    settings: dict, tmp_path: Path, tinyworld: Path, more: dict, message: str
) -> None:
    parts = [{"kind": kind, "path": str(tinyworld / kind)} for kind in ("eagle3", "dflash")]
    if "costs" in more:
        parts[1] = {"kind": "ngram"}
    if "path" in more:
        parts = [{"kind": "eagle3", "path": more.pop("path")}, {"kind": "ngram"}]
    if "top_k" in more:
        parts = [{**parts[0], "top_k": more.pop("top_k")}, {"kind": "ngram"}]
    path = write(tmp_path, of_two(settings, tinyworld, *parts, **more))
    code, _, err = run_cli("check", "-c", path)
    assert code == 2
    assert message in err.replace("\n", " ")


def test_requests_are_records_of_their_own() -> None:
    """What one request shows of a drafter does not choose for another."""
    target = contract_target()
    both = BestOfDrafter.examples(target, 3)["copies"]
    state = both.new_state(2, 64, None)
    assert state.records[0] is not state.records[1]
    request = GenerationRequest("r", torch.arange(1, 9), 24)
    alone = rounds(target, both, [request])
    other = GenerationRequest("s", torch.arange(30, 50), 24)
    engine = make_engine(target, both, [other, request], 2)
    (found,) = [one for one in engine.generate([other, request]) if one.request.id == "r"]
    assert len(found.rounds) == alone
