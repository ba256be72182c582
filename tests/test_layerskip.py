"""Self-speculation: a target with some of its layers, which those are, and what it leaves untouched."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import SamplingVerifier
from cosched.errors import ConfigError
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config
from cosched.testing.harness import decode, make_engine, make_requests
from cosched.testing.sampling import FALSE_ALARM, p_values, sampling_target
from drafters.best_of import BestOfDrafter
from drafters.layerskip import LayerskipDrafter, LayerskipSettings
from drafters.layerskip.choices import MEMORY, Choices, skipped_sets
from tests.helpers.experiments import run_without_updates, write

TEXT = torch.arange(1, 13)


def drafter(target: Target, num_draft_tokens: int = 3, **settings) -> LayerskipDrafter:
    given = LayerskipSettings(kind="layerskip", num_draft_tokens=num_draft_tokens, **settings)
    return LayerskipDrafter.load(given, target)


def test_a_target_with_some_layers_is_a_model_of_those_layers(target: Target) -> None:
    """From an empty cache: what a model computes that has no others; and the target is whole again."""
    for layers in ((0,), (0, 2), (1, 2), (0, 1, 2)):
        model = copy.deepcopy(target.model)
        model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in layers])
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        model.config.num_hidden_layers = len(layers)
        expected = model(input_ids=TEXT[None]).logits
        positions = torch.arange(len(TEXT))[None]
        cache = target.new_cache(1, len(TEXT))
        found = target.forward(TEXT[None], positions, cache, layers=layers).logits_BTV
        assert torch.allclose(found, expected, atol=1e-5)
    assert len(target.model.model.layers) == 3
    whole = target.forward(TEXT[None], positions, target.new_cache(1, len(TEXT))).logits_BTV
    assert torch.allclose(whole, target.model(input_ids=TEXT[None]).logits, atol=1e-5)


def test_verification_never_sees_what_a_draft_wrote(target: Target) -> None:
    """Its rows are the same to the bit, whether or not layers of the target drafted before it."""
    found = []
    for drafts in (0, 3):
        rows = LiveRows(target, 1, 32, ())
        rows.commit(0, TEXT[:6], 0)
        for k in range(drafts):
            rows.layers(TEXT[6 + k].view(1, 1), torch.tensor([[6 + k]]), (0, 2))
        found.append(rows.verify(TEXT[None, 6:10], torch.arange(6, 10)[None]).logits_BTV)
    assert torch.equal(*found)


def test_requests_that_leave_out_other_layers_draft_in_one_batch(target: Target) -> None:
    """A pass for each set of layers; every request has what it would have alone."""
    forwards = []

    def row(batch: int, slots: list[int]) -> list[torch.Tensor]:
        one, rows = drafter(target, shared=False), LiveRows(target, batch, 32, ())
        state = one.new_state(batch, 32, None)

        def forward(ids, positions, layers, counts):
            forwards.append(layers)
            return rows.layers(ids, positions, layers, counts)

        one.lend(state, forward)
        for slot, place in enumerate(slots):
            rows.commit(slot, TEXT[: 5 + place], 0)
            state.slots[slot].length, state.slots[slot].newest = 6 + place, int(TEXT[5 + place])
        ids = torch.tensor([state.slots[slot].newest for slot in range(batch)])
        at = torch.tensor([state.slots[slot].length - 1 for slot in range(batch)])
        return list(one._logits(state, [place % 2 for place in slots], ids, at))

    together = row(3, [0, 1, 2])
    assert len(forwards) == 2
    for place, found in enumerate(together):
        assert torch.allclose(found, row(1, [place])[0], atol=1e-5)


def test_sets_of_layers_are_sets_of_layers() -> None:
    """Each once, in order, the first layer in none; also of a target that has hardly any."""
    for num_layers in range(2, 81):
        found = skipped_sets(num_layers)
        assert found
        assert len(set(found)) == len(found)
        for one in found:
            assert list(one) == sorted(set(one))
            assert 1 <= one[0] <= one[-1] < num_layers


def simulate(choices: Choices, chances: list[float], rounds: int, number: int = 3) -> list[int]:
    """Which sets were taken, where drafts without each are accepted with that chance a place."""
    draw, taken = random.Random(0), []
    for _ in range(rounds):
        one = choices.choose(number)
        accepted = 0
        while accepted < number and draw.random() < chances[one]:
            accepted += 1
        choices.observe(one, number, accepted)
        taken.append(one)
    return taken


def test_the_set_that_commits_most_for_its_layers_is_found() -> None:
    """Neither the most accepted nor the cheapest; and another, once text has come to favour that."""
    costs, supposed = [0.8, 0.5, 0.3], [0.97, 0.85, 0.7]
    choices = Choices(supposed, costs, 3)
    first = simulate(choices, [0.95, 0.9, 0.3], 400)
    assert first[200:].count(1) > 0.9 * 200
    later = simulate(choices, [0.95, 0.1, 0.85], 3 * MEMORY)
    assert later[-200:].count(2) > 0.9 * 200


def test_a_set_stays_for_a_while() -> None:
    taken = simulate(Choices([0.9, 0.9], [0.5, 0.5], 3), [0.5, 0.5], 64)
    assert all(len(set(taken[at : at + 16])) == 1 for at in range(0, 64, 16))


def test_what_one_request_shows_chooses_for_others_unless_each_is_alone(target: Target) -> None:
    """Shared, later requests draft without what the first have found; each alone they begin anew."""
    for shared in (True, False):
        one = drafter(target, shared=shared)
        state = one.new_state(2, 64, None)
        assert (state.slots[0].choices is state.slots[1].choices) == shared
        one.move_slot(state, 1, 0)
        assert (state.slots[0].choices is state.slots[1].choices) == shared


@pytest.mark.parametrize("max_batch", [1, 3])
def test_shared_choices_change_no_text(target: Target, max_batch: int) -> None:
    requests = make_requests(target, count=4, prompt=9, new=64)
    plain = decode(make_engine(target, None, requests), requests)
    engine = make_engine(target, drafter(target), requests, max_batch)
    assert decode(engine, requests) == plain


def beside_a_copy(target: Target, num_draft_tokens: int) -> BestOfDrafter:
    ngram = DRAFTERS.get("ngram").examples(target, num_draft_tokens)["suffix"]
    named = [("layerskip", drafter(target, num_draft_tokens)), ("ngram", ngram)]
    return BestOfDrafter(named, target, num_draft_tokens, [0.1, 0.0])


def test_beside_a_copy_text_is_the_targets(target: Target) -> None:
    """As the model of ``best_of``: greedy to the bit, sampled by chi-square."""
    requests = make_requests(target, count=4, prompt=9, new=64)
    plain = decode(make_engine(target, None, requests), requests)
    assert decode(make_engine(target, beside_a_copy(target, 3), requests, 3), requests) == plain
    small, sampling = sampling_target(), SamplingParams(1.0)
    found = p_values(small, beside_a_copy(small, 2), SamplingVerifier(sampling), sampling)
    assert min(found) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.long
def test_a_run_repeats_and_takes_no_updates(settings: dict, tmp_path: Path) -> None:
    settings["drafter"] = {"kind": "layerskip", "num_draft_tokens": 3, "window": 48}
    del settings["adapt"]
    run_without_updates(tmp_path, settings)


@pytest.mark.parametrize("composed", [False, True])
def test_over_a_trace_it_needs_the_target(settings: dict, tmp_path: Path, composed: bool) -> None:
    """Refused by name, unless the trace's rows are computed all the same."""
    settings["drafter"] = {"kind": "layerskip"}
    key = r"drafter\.kind"
    if composed:
        parts = [{"kind": "ngram"}, {"kind": "layerskip"}]
        settings["drafter"] = {"kind": "best_of", "drafters": parts}
        key = r"drafter\.drafters\[1\]\.kind"
    del settings["adapt"]
    settings["engine"] |= {"kind": "trace", "trace": "nowhere"}
    path = write(tmp_path, settings)
    with pytest.raises(
        ConfigError, match=key + r": layerskip drafts with the target.*engine\.live"
    ):
        load_config(path, ["arms=[frozen]"])
    load_config(path, ["arms=[frozen]", "engine.live=true"])
