"""LoRA: one set of adapters, merged when it is published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

from cosched.build.coscheduler import build_coscheduler
from cosched.engines.embedded.target import Target
from cosched.loop.publish import InPlacePublisher
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import Decision, SignalBatch
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import NoEvents
from cosched.testing.harness import collected, decode, make_engine, make_requests, serve
from cosched.training.lora import MergingTrainer, find_layers, placed
from cosched.training.scope import scope_of
from tests.helpers.adapters import (
    FAMILIES,
    Configure,
    copied,
    examples,
    make_trainer,
    same,
)
from tests.helpers.batches import make_batch
from tests.helpers.drafts import make_drafter


@pytest.fixture
def config(configure: Configure) -> Config:
    return configure()


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    return make_batch(target, count=2, new=60)


def test_a_draft_with_new_adapters_is_the_draft(target: Target, config: Config) -> None:
    """To the bit, for every kind of checkpoint; a zero keeps its sign."""
    for drafter in examples(target):
        network = drafter.network()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.view(-1)[0] = -0.0
        lora = scope_of(drafter, config.adapt.scope).parameters
        trainer = make_trainer(config, target, drafter)
        first = {name: p.detach() for name, p in network.named_parameters() if name in lora}
        assert same(trainer.weights(), first)
        publisher = InPlacePublisher.of_modules(network, target.model)
        assert publisher.publish(trainer.weights()).version == 1


@pytest.mark.slow
def test_merged_weights_say_what_the_adapters_say(target: Target, config: Config) -> None:
    """The loss through adapters is that of a draft without any that has the merged weights."""
    for drafter in examples(target):
        rounds = serve(target, drafter, make_requests(target, 2, prompt=9, new=30), max_batch=2)
        batch = collected(target, drafter, "delayed", None, rounds)
        assert batch is not None
        trainer = make_trainer(config, target, drafter)
        losses = trainer.update(batch, Decision(4, learning_rate=1e-2)).losses
        assert losses[-1] < losses[0]
        merged = drafter.clone(torch.float32)
        merged.network().load_state_dict(trainer.weights(), strict=False)
        expected = make_trainer(config, target, merged).update(batch, Decision(1)).losses[0]
        batch_loss = trainer.trainer.batch_loss
        in_its_place = placed(batch_loss.network, dict(merged.network().named_parameters()))
        names = {f"network.{name}": weight for name, weight in in_its_place.items()}
        with torch.no_grad():
            assert float(functional_call(batch_loss, names, (batch,))) == pytest.approx(expected)
        found = trainer.update(batch, Decision(1)).losses[0]
        assert found == pytest.approx(expected, rel=1e-5)
        assert found != pytest.approx(losses[0], rel=1e-3)


def test_only_adapters_are_trained_and_kept_for(
    target: Target, batch: SignalBatch, config: Config
) -> None:
    """The optimizer holds A and B of each layer and nothing else; what they stand on stays."""
    trainer = make_trainer(config, target, make_drafter(target))
    assert isinstance(trainer, MergingTrainer)
    deepspeed: Any = trainer.trainer
    network = deepspeed.batch_loss.network
    before = copied({n: p.detach() for n, p in network.named_parameters() if "lora_" not in n})
    trainer.update(batch, Decision(3))
    after = {n: p.detach() for n, p in network.named_parameters() if "lora_" not in n}
    assert same(before, after)
    state = deepspeed.state()
    moments = sum(t.numel() for n, t in state.items() if n.endswith(("exp_avg", "exp_avg_sq")))
    network = make_drafter(target).network()
    linear = [network.get_submodule(layer).weight for layer in find_layers(network, None)]
    assert moments == 2 * sum(4 * sum(weight.shape) for weight in linear)
    assert set(trainer.weights()) == {f"{layer}.weight" for layer in find_layers(network, None)}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_lora_is_reset_to_the_bit(
    target: Target, batch: SignalBatch, configure: Configure, zero_stage: int
) -> None:
    """Also after weights of an earlier version were loaded, which take the place of the base."""
    config = configure(f"adapt.trainer.zero_stage={zero_stage}")
    trainer = make_trainer(config, target, make_drafter(target))
    first = copied(trainer.weights())
    losses = trainer.update(batch, Decision(3)).losses
    after = copied(trainer.weights())
    assert not same(after, first)
    trainer.load(after)
    assert same(trainer.weights(), after)
    trainer.update(batch, Decision(1))
    trainer.reset()
    assert same(trainer.weights(), first)
    assert trainer.update(batch, Decision(3)).losses == losses
    assert same(trainer.weights(), after)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_restored_lora_goes_on_exactly(
    target: Target, batch: SignalBatch, config: Config, loaded: bool
) -> None:
    """Whether or not a rollback has changed what the adapters stand on."""
    drafter = make_drafter(target)
    one, other, loser = (make_trainer(config, target, drafter) for _ in range(3))
    one.update(batch, Decision(2))
    if loaded:
        one.load(copied(one.weights()))
        one.update(batch, Decision(1))
    loser.update(batch, Decision(2))
    loser.load(copied(loser.weights()))
    state = copied(one.state())
    expected = one.update(batch, Decision(2)).losses
    for trainer in (other, loser):  # new, and with a base of its own
        trainer.restore(state)
        assert trainer.update(batch, Decision(2)).losses == expected
        assert same(trainer.weights(), one.weights())
        trainer.reset()
        assert same(trainer.weights(), make_trainer(config, target, drafter).weights())


def test_adapters_are_the_same_for_a_seed_and_disturb_no_draw(
    target: Target, batch: SignalBatch, configure: Configure
) -> None:
    """Ranks that train together must begin alike, and SGLang's sampling must not depend on us."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    runs = []
    for seed in (0, 0, 1):
        drafter = make_drafter(target)
        torch.manual_seed(5)
        trainer = make_trainer(configure(f"run.seed={seed}"), target, drafter)
        assert torch.equal(torch.rand(1), expected)
        trainer.update(batch, Decision(1))
        runs.append(copied(trainer.weights()))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.slow
def test_lora_serves_per_request_without_loss(target: Target, configure: Configure) -> None:
    """The text is the target's own, and the second request is served as if it were the first."""
    requests = make_requests(target, count=2, prompt=8, new=120)
    plain = decode(make_engine(target, None, requests), requests)
    settings = configure("adapt.scope.state=per_request")
    runs = {}
    for order in (requests, requests[1:]):
        drafter = make_drafter(target)
        network = drafter.network()
        first = copied({n: p.detach() for n, p in network.named_parameters()})
        publisher = InPlacePublisher.of_modules(network, target.model)
        observer = build_coscheduler(settings, target, drafter, publisher, None, NoEvents())
        done = list(make_engine(target, drafter, order, observer=observer).generate(order))
        assert all(list(one.tokens) == plain[one.request.id] for one in done)
        assert observer.counters.updates > 5
        runs[len(order)] = [row.num_accepted for row in done[-1].rounds]
        assert same({n: p.detach() for n, p in network.named_parameters()}, first)  # reset
    assert runs[2] == runs[1]


def test_a_rollback_serves_an_earlier_version(target: Target, configure: Configure) -> None:
    """Its merged weights to the bit, and learning goes on from them; version 0 is always there."""
    requests = make_requests(target, count=1, prompt=8, new=120)
    drafter = make_drafter(target)
    network = drafter.network()
    first = copied({n: p.detach() for n, p in network.named_parameters()})
    publisher = InPlacePublisher.of_modules(network, target.model, keep=50)
    observer = build_coscheduler(configure(), target, drafter, publisher, None, NoEvents())
    decode(make_engine(target, drafter, requests, observer=observer), requests)
    kept = copied(publisher.weights_of(3))
    observer.roll_back(3)
    serving = dict(network.named_parameters())
    assert same({n: serving[n].detach() for n in kept}, kept)
    decode(make_engine(target, drafter, requests, observer=observer), requests)
    observer.roll_back(0)
    assert same({n: p.detach() for n, p in network.named_parameters()}, first)


def test_lora_takes_memory_for_its_adapters_only(configure: Configure) -> None:
    """r (in + out) of each layer, beside the copy that they stand on and what is published."""
    for family in FAMILIES:
        lora, full = (
            footprint(config, *sketch(config))
            for config in (
                configure("adapt.trainer.zero_stage=1", family=family),
                configure("adapt.scope.kind=full", "adapt.trainer.zero_stage=1", family=family),
            )
        )
        target, drafter = sketch(configure(family=family))
        del target
        network: Any = drafter.network()
        layers = [network.get_submodule(name).weight for name in find_layers(network, None)]
        adapters = 4 * sum(sum(weight.shape) for weight in layers)
        published = sum(weight.numel() for weight in layers)
        assert lora.num_trained == adapters
        assert (lora.masters, lora.moments) == (8 * adapters, 8 * adapters)
        assert full.step - lora.step > 4 * published  # gradients
        assert lora.trainer_copy == full.trainer_copy + 4 * adapters
        assert lora.merged == 4 * published
        assert lora.last_good == 4 * (lora.num_draft_parameters + published)
        assert full.merged == 0
        assert lora.added < full.added
