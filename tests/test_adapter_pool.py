"""An adapter for each tenant, or for each request of a batch."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cosched.build.coscheduler import build_coscheduler
from cosched.build.trainer import build_scorer, build_trainer
from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.loop.counters import Counters
from cosched.loop.publish import InPlacePublisher
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import NoEvents
from cosched.testing.harness import decode, make_engine, make_requests
from cosched.testing.specimen import Feeder, make_texts
from cosched.training.background import BackgroundTrainer
from cosched.training.scope import lora_of
from tests.helpers.adapters import (
    Configure,
    copied,
    make_pool,
    owned,
    run_pool,
    same,
    serving,
)
from tests.helpers.drafts import make_drafter


@pytest.fixture
def per_tenant(configure: Configure) -> Config:
    return configure("adapt.scope={state: per_tenant, tenants: [a, b, c]}", "engine.max_batch=3")


@pytest.mark.slow
def test_tenants_learn_apart_and_lose_nothing(target: Target, per_tenant: Config) -> None:
    """Greedy text is the target's own; who did not ask for anything has learnt nothing, to the bit."""
    requests = owned(make_requests(target, count=5, prompt=8, new=90), "a", "b")
    plain = decode(make_engine(target, None, requests, 3), requests)
    drafter = make_drafter(target)
    base = copied({n: p.detach() for n, p in drafter.network().named_parameters()})
    pool = make_pool(per_tenant, target, drafter)
    first = serving(pool)
    done = run_pool(target, drafter, pool, requests)
    assert {name: list(one.tokens) for name, one in done.items()} == plain
    a, b, c = serving(pool)
    assert not same(a, first[0])
    assert not same(a, b)
    assert same(c, first[2])
    assert same({n: p.detach() for n, p in drafter.network().named_parameters()}, base)
    assert [part.version > 3 for part in pool.parts] == [True, True, False]
    assert pool.version == sum(part.version for part in pool.parts)
    assert pool.counters.updates == pool.version
    rows = [row for one in done.values() for row in one.rounds]
    assert pool.counters.committed == sum(row.num_committed for row in rows)
    assert pool.counters.accepted == sum(row.num_accepted for row in rows)


def test_training_one_tenant_changes_no_draft_of_another(
    target: Target, per_tenant: Config
) -> None:
    """To the bit, in the same batch; and nothing of it depends on who else is served."""
    drafter = make_drafter(target)
    pool = make_pool(per_tenant, target, drafter)

    def logits() -> Tensor:
        feeder = Feeder(drafter, make_texts(target, drafter, 2, 60))
        drafter.use_adapter(feeder.state, 0, 0)
        drafter.use_adapter(feeder.state, 1, 1)
        return feeder.run(3)

    before, first = logits(), serving(pool)
    run_pool(target, drafter, pool, owned(make_requests(target, 3, prompt=8, new=90), "a"))
    after = logits()
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-3)
    assert same(serving(pool)[1], first[1])


def test_trainers_stand_on_one_base(target: Target, per_tenant: Config) -> None:
    """Frozen weights are one storage for all of them; each optimizer holds its adapters' state."""
    drafter = make_drafter(target)
    pool = make_pool(per_tenant, target, drafter)
    run_pool(target, drafter, pool, owned(make_requests(target, 3, 8, 40), "a", "b", "c"))
    trainers: list[Any] = [part.trainer for part in pool.parts]
    networks = [trainer.batch_loss.network for trainer in trainers]
    bases = [
        {n: p.data_ptr() for n, p in network.named_parameters() if not p.requires_grad}
        for network in networks
    ]
    assert bases[0] == bases[1] == bases[2]
    assert len(bases[0]) == len(list(drafter.network().parameters()))
    assert not set(bases[0].values()) & {p.data_ptr() for p in drafter.network().parameters()}
    trained = [
        {p.data_ptr() for p in network.parameters() if p.requires_grad} for network in networks
    ]
    assert not trained[0] & trained[1]
    lora = lora_of(drafter, per_tenant.adapt.scope)
    assert lora is not None
    for trainer in trainers:
        state = trainer.state()
        moments = sum(t.numel() for n, t in state.items() if n.endswith(("exp_avg", "exp_avg_sq")))
        assert moments == 2 * lora.num_parameters(drafter.network())


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_requests_of_a_batch_learn_apart_and_are_forgotten(
    target: Target, configure: Configure, background: bool
) -> None:
    """Five requests over three adapters: no text is lost, and every adapter ends as it began."""
    config = configure(
        "adapt.scope.state=per_request",
        "engine.max_batch=3",
        f"adapt.trainer.background={background}",
    )
    requests = make_requests(target, count=5, prompt=8, new=90)
    plain = decode(make_engine(target, None, requests, 3), requests)
    drafter = make_drafter(target)
    pool = make_pool(config, target, drafter)
    first = serving(pool)
    done = run_pool(target, drafter, pool, requests)
    assert {name: list(one.tokens) for name, one in done.items()} == plain
    assert all(part.counters.updates > 3 for part in pool.parts)
    assert all(same(now, was) for now, was in zip(serving(pool), first, strict=True))


def test_an_update_under_way_when_its_request_ends_serves_nobody(
    target: Target, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background, and the first of its request: what it learnt goes with the request."""
    config = configure("adapt.scope.state=per_request", "adapt.trainer.background=true")
    drafter = make_drafter(target)
    publisher = InPlacePublisher.of_modules(drafter.network(), target.model)
    copy = drafter.clone(torch.float32)
    trainer = BackgroundTrainer(build_trainer(config, target, copy), target.device)
    learner = trainer, build_scorer(config, target, copy, "sampled")
    observer = build_coscheduler(
        config, target, drafter, publisher, None, NoEvents(), learner=learner
    )
    first = copied(trainer.weights())
    monkeypatch.setattr(trainer, "finished", lambda: None)  # it takes longer than the request
    one, *_ = requests = make_requests(target, count=1, prompt=8, new=40)
    decode(make_engine(target, drafter, requests, observer=observer), [one])
    assert not observer.busy
    trained = copied(trainer.weights())
    assert observer.counters.updates == 0
    assert same(trained, first)


@pytest.mark.slow
def test_a_lent_adapter_comes_back_as_it_was(target: Target, configure: Configure) -> None:
    """A request is served round by round as if none had used its adapter before."""
    config = configure("adapt.scope.state=per_request", "engine.max_batch=3")
    requests = make_requests(target, count=2, prompt=8, new=90)
    rounds = []
    for before in (requests[:1], []):
        drafter = make_drafter(target)
        pool = make_pool(config, target, drafter)
        if before:
            run_pool(target, drafter, pool, before)
            assert pool.parts[0].counters.updates > 3
        done = run_pool(target, drafter, pool, requests[1:])
        rounds.append([row.num_accepted for row in done["r1"].rounds])
    assert rounds[0] == rounds[1]


@pytest.mark.slow
def test_a_pool_counts_what_guards_did(target: Target, configure: Configure) -> None:
    """Refusals and their cost are those of all adapters; a prefill is no round."""
    guard = "{kind: shadow, anchors: 4}"
    config = configure(
        "adapt.scope.state=per_request", "engine.max_batch=2", f"adapt.guard={guard}"
    )
    drafter = make_drafter(target)
    pool = make_pool(config, target, drafter)
    requests = make_requests(target, count=2, prompt=8, new=90)
    done = run_pool(target, drafter, pool, requests)
    counters, parts = pool.counters, [part.counters for part in pool.parts]
    assert counters.refused == sum(part.refused for part in parts) > 0
    assert counters.rolled_back == sum(part.rolled_back for part in parts)
    assert 0 < counters.guard_seconds < counters.update_seconds_total
    assert counters.rounds == max(len(one.rounds) for one in done.values())


@pytest.mark.slow
def test_a_pool_goes_on_exactly(target: Target, per_tenant: Config) -> None:
    """Counters, versions, adapters and moments of every tenant, through a file."""
    requests = owned(make_requests(target, count=4, prompt=8, new=60), "a", "b")
    whole, cut = make_drafter(target), make_drafter(target)
    pool = make_pool(per_tenant, target, whole)
    run_pool(target, whole, pool, requests[:2])
    counters, version, tensors = pool.state()
    tensors = copied(tensors)
    counters = msgspec.json.decode(msgspec.json.encode(counters), type=Counters)
    expected = run_pool(target, whole, pool, requests[2:])
    second = make_pool(per_tenant, target, cut)
    second.restore(counters, version, tensors)
    assert second.version == version > 2
    found = run_pool(target, cut, second, requests[2:])
    assert [one.rounds for one in found.values()] == [one.rounds for one in expected.values()]
    assert all(same(*pair) for pair in zip(serving(pool), serving(second), strict=True))
    assert second.version == pool.version
    assert second.counters.committed == pool.counters.committed


def test_a_draft_that_serves_no_adapters_is_refused(target: Target, per_tenant: Config) -> None:
    class Other:
        """A stranger's drafter: a network, and nothing that serves adapters."""

        def __init__(self) -> None:
            self.network = make_drafter(target).network

    with pytest.raises(ConfigError, match=r"adapt\.scope\.state: per_tenant needs a draft"):
        make_pool(per_tenant, target, Other())
