"""What learns: full, tail and LoRA, and for how long it is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from cosched.build.coscheduler import build_coscheduler, build_pool
from cosched.build.embedded import build_world
from cosched.build.trainer import build_scorer, build_trainer
from cosched.engines.embedded.target import Target
from cosched.engines.request import FinishedRequest, GenerationRequest
from cosched.errors import ConfigError, WorkloadError
from cosched.loop.counters import Counters
from cosched.loop.per_adapter import CoschedulerPool
from cosched.loop.publish import InPlacePublisher
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import Decision, SignalBatch
from cosched.registry import DRAFTERS
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import NoEvents, RunFolder
from cosched.testing.harness import collected, decode, make_engine, make_requests, serve
from cosched.testing.specimen import Feeder, make_texts
from cosched.training.background import BackgroundTrainer
from cosched.training.lora import MergingTrainer, find_layers, placed
from cosched.training.scope import lora_of, scope_of
from cosched.workload.requests import check_texts
from tests.conftest import make_drafter

FAMILIES = ("eagle3", "dflash", "pard")


Configure = Callable[..., Config]


@pytest.fixture
def configure(tinyworld: Path, tmp_path: Path) -> Configure:
    """A run of the tiny world with LoRA; its settings may be overridden."""
    settings = {
        "run": {"name": "scopes", "dir": str(tmp_path)},
        "target": {"path": f"{tinyworld}/target"},
        "drafter": {"num_draft_tokens": 3},
        "workload": {"prompts": f"{tinyworld}/prompts/translated.jsonl", "max_new_tokens": 64},
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 4, "num_steps": 2},
            "replay": {"window": 64, "anchors": 16},
            "scope": {"kind": "lora", "rank": 4, "alpha": 8},
            "trainer": {"lr": 3e-3},
            "guard": {"kind": "finite"},
        },
    }
    path = tmp_path / "scopes.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML

    def configured(*overrides: str, family: str = "eagle3") -> Config:
        drafter = (f"drafter.kind={family}", f"drafter.path={tinyworld}/{family}")
        return load_config(path, [*drafter, *overrides])

    return configured


@pytest.fixture
def config(configure: Configure) -> Config:
    return configure()


@pytest.fixture(scope="module")
def batch(target: Target) -> SignalBatch:
    drafter, requests = make_drafter(target), make_requests(target, count=2, prompt=9, new=60)
    sample = collected(
        target, drafter, "delayed", None, serve(target, drafter, requests, max_batch=2)
    )
    assert sample is not None
    return sample


def make_trainer(config: Config, target: Target, drafter: Any) -> Any:
    return build_trainer(config, target, drafter.clone(torch.float32))


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same names and bits; -0 is not 0."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def examples(target: Target) -> Iterator[Any]:
    """Every kind of checkpoint of the three families."""
    for family in FAMILIES:
        torch.manual_seed(1)
        yield from DRAFTERS.get(family).examples(target, 3).values()


# --- which layers --------------------------------------------------------------------------------


def test_targets_that_match_nothing_list_the_layers(target: Target, config: Config) -> None:
    scope = msgspec.structs.replace(config.adapt.scope, targets=("q_proj", "qproj"))
    with pytest.raises(
        ConfigError, match=r"targets: 'qproj' names no .*midlayer\.self_attn\.q_proj"
    ):
        scope_of(make_drafter(target), scope)


def test_the_body_has_no_table_of_words(target: Target) -> None:
    """A head tied to the embedding is most of a small draft, and dear to step and to publish."""
    tables = ("embed_tokens.weight", "lm_head.weight")
    left_out = set[str]()
    for drafter in examples(target):
        full, body = (set(drafter.scopes()[kind].parameters) for kind in ("full", "body"))
        assert full - body == {name for name in full if name.endswith(tables)}
        left_out |= full - body
    assert left_out == {"lm_head.weight", "model.embed_tokens.weight"}


def test_an_unknown_scope_lists_the_scopes(target: Target, config: Config) -> None:
    scope = msgspec.structs.replace(config.adapt.scope, kind="heads")
    with pytest.raises(ConfigError, match=r"'heads' is no scope .* full, body, tail, lora"):
        scope_of(make_drafter(target), scope)


def test_targets_are_whole_names_or_their_ends(target: Target) -> None:
    network = make_drafter(target).network()
    assert find_layers(network, ["fc", "mlp.up_proj"]) == ("fc", "midlayer.mlp.up_proj")
    everything = find_layers(network, None)
    assert len(everything) == 9
    assert find_layers(network, everything) == everything
    with pytest.raises(ConfigError):
        find_layers(network, ["proj"])  # no end of a name, but of a word


def test_lora_keeps_the_cache_where_its_targets_do(target: Target, config: Config) -> None:
    """As ``tail`` does: no committed key is made of them."""

    def keeps(*targets: str) -> bool:
        scope = msgspec.structs.replace(config.adapt.scope, targets=targets)
        return scope_of(make_drafter(target), scope).keeps_cache

    assert keeps("down_proj", "o_proj", "q_proj")
    assert not keeps("down_proj", "k_proj")
    assert not keeps("fc")


# --- one set of adapters, merged when it is published --------------------------------------------


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
        batch_loss = trainer._trainer._batch_loss
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
    deepspeed: Any = trainer._trainer
    network = deepspeed._batch_loss.network
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
                configure(family=family),
                configure("adapt.scope.kind=full", family=family),
            )
        )
        target, drafter = sketch(configure(family=family))
        del target
        network: Any = drafter.network()
        layers = [network.get_submodule(name).weight for name in find_layers(network, None)]
        adapters = 4 * sum(sum(weight.shape) for weight in layers)
        published = sum(weight.numel() for weight in layers)
        assert lora.num_trained == adapters
        assert (lora.masters, lora.moments, lora.gradients) == (
            4 * adapters,
            8 * adapters,
            4 * adapters,
        )
        assert lora.trainer_copy == full.trainer_copy + 4 * adapters
        assert lora.merged == 4 * published
        assert lora.last_good == 4 * (lora.num_draft_parameters + published)
        assert full.merged == 0
        assert lora.added < full.added


# --- an adapter for each tenant, or each request of a batch ---------------------------------------


@pytest.fixture
def per_tenant(configure: Configure) -> Config:
    return configure("adapt.scope={state: per_tenant, tenants: [a, b, c]}", "engine.max_batch=3")


def make_pool(config: Config, target: Target, drafter: Any) -> CoschedulerPool:
    return build_pool(config, target, drafter, None, NoEvents())


def owned(requests: list[GenerationRequest], *tenants: str) -> list[GenerationRequest]:
    """The requests, of those tenants in turn."""
    return [
        replace(request, tenant=tenants[index % len(tenants)])
        for index, request in enumerate(requests)
    ]


def run_pool(
    target: Target, drafter: Any, pool: CoschedulerPool, requests: list[GenerationRequest]
) -> dict[str, FinishedRequest]:
    engine = make_engine(target, drafter, requests, 3, observer=pool, admit=pool.admit)
    return {done.request.id: done for done in engine.generate(requests)}


def serving(pool: CoschedulerPool) -> list[dict[str, Tensor]]:
    """What each adapter's publisher writes into, as it is now."""
    publishers: list[Any] = [part._publisher for part in pool._parts]
    return [copied(publisher._serving.draft) for publisher in publishers]


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
    assert [part.version > 3 for part in pool._parts] == [True, True, False]
    assert pool.version == sum(part.version for part in pool._parts)
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
    trainers: list[Any] = [part._trainer for part in pool._parts]
    networks = [trainer._batch_loss.network for trainer in trainers]
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
    assert all(part.counters.updates > 3 for part in pool._parts)
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
    learner = trainer, build_scorer(config, target, copy, "sampled", 1.0)
    observer = build_coscheduler(
        config, target, drafter, publisher, None, NoEvents(), learner=learner
    )
    first = copied(trainer.weights())
    monkeypatch.setattr(trainer, "finished", lambda: None)  # it takes longer than the request
    one, *_ = requests = make_requests(target, count=1, prompt=8, new=40)
    decode(make_engine(target, drafter, requests, observer=observer), [one])
    assert not observer.busy
    taught = copied(trainer.weights())
    assert observer.counters.updates == 0
    assert same(taught, first)


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
            assert pool._parts[0].counters.updates > 3
        done = run_pool(target, drafter, pool, requests[1:])
        rounds.append([row.num_accepted for row in done["r1"].rounds])
    assert rounds[0] == rounds[1]


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
    counters, parts = pool.counters, [part.counters for part in pool._parts]
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


# --- settings, files and memory ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapt.scope={kind: full, state: per_request}", "engine.max_batch=2"], "kind: lora"),
        (["adapt.scope={kind: full, state: per_tenant, tenants: [a]}"], "needs adapters"),
        (["adapt.scope.state=per_tenant"], r"scope\.tenants: the tenants of"),
        (["adapt.scope.tenants=[a]"], r"tenants: .* got \['a'\] with state: shared"),
        (["adapt.scope={state: per_tenant, tenants: [a, b, a]}"], "same tenant twice"),
        (["adapt.scope={state: per_tenant, tenants: [../a]}"], r"scope\.tenants"),
        (["adapt.scope.rank=0"], r"scope\.rank: .*>= 1, got 0"),
        (["adapt.scope.alpha=0"], r"scope\.alpha"),
        (["adapt.scope.targets=[]"], r"scope\.targets"),
        (
            ["adapt.scope={kind: tail, rank: 4}"],
            r"scope\.rank: only adapters .*got 4 with kind: tail",
        ),
        (
            ["variants.mine.scope={kind: full, targets: [o_proj]}", "arms=[mine]"],
            r"variants\.mine\.scope\.targets: only adapters",
        ),
        (
            ["engine.kind=sglang", "adapt.scope={state: per_tenant, tenants: [a]}"],
            "SGLang serves one draft to all",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(
    configure: Configure, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(*overrides)


def test_another_scope_leaves_the_adapters_behind(configure: Configure) -> None:
    """The file's rank is not that of a scope which has none."""
    assert configure().adapt.scope.rank == 4
    assert configure("adapt.scope.kind=full").adapt.scope.rank == 8
    assert configure("variants.mine.scope.kind=tail").variants["mine"].scope.rank == 8
    assert configure("adapt.scope.alpha=2").adapt.scope.rank == 4


def write_prompts(path: Path, *tenants: Any) -> Path:
    """A file of short prompts, each of a tenant; None names none."""
    lines = [
        {"id": f"p{i}", "text": f"NAME\nprogram{i} - does this and that"}
        | ({} if tenant is None else {"tenant": tenant})
        for i, tenant in enumerate(tenants)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("tenant", "message"),
    [
        (
            "d",
            r"tenant without an adapter: request p1 is of 'd'; adapt\.scope\.tenants has a, b, c",
        ),
        (None, "request p1 names no tenant"),
        (7, "line 2 of .* has the tenant 7; expected a name"),
    ],
)
def test_a_tenant_without_an_adapter_is_found_before_the_run(
    per_tenant: Config, tmp_path: Path, tenant: Any, message: str
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", tenant)
    workload = msgspec.structs.replace(per_tenant.workload, prompts=str(prompts))
    with pytest.raises(WorkloadError, match=message):
        build_world(msgspec.structs.replace(per_tenant, workload=workload))


def test_tenants_of_a_variant_are_looked_for_too(configure: Configure, tmp_path: Path) -> None:
    """By a run before it begins, and by ``cosched check``."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", "d")
    scope = "{kind: lora, rank: 4, state: per_tenant, tenants: [a]}"
    words = (f"workload.prompts={prompts}", f"variants.mine.scope={scope}")
    for check in (build_world, check_texts):
        check(configure(*words))  # no arm learns that way
        with pytest.raises(
            WorkloadError, match=r"p1 is of 'd'; variants\.mine\.scope\.tenants has a"
        ):
            check(configure(*words, "arms=[plain, mine]"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_tenants(configure: Configure, tmp_path: Path, family: str) -> None:
    """From files to files: the plain text, events that say whose they are, a draft for each tenant;
    and the same from a recording, which knows the tenants."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", "b", "a", "b")
    config = configure(
        f"workload.prompts={prompts}",
        "adapt.scope={state: per_tenant, tenants: [a, b, c]}",
        "engine.max_batch=2",
        "engine.num_threads=1",
        "arms=[plain, adapted]",
        family=family,
    )
    folder = RunFolder(config.run_folder)
    folder.create()
    summary = Experiment(config, record=True).run(folder)
    adapted = summary.arms["adapted"]
    assert adapted.lossless_mismatches == 0
    assert adapted.versions == adapted.updates > 4
    lines = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    published = [line for line in lines if line["kind"] == "publication"]
    assert {line["adapter"] for line in published} == {"a", "b"}
    assert [line["version"]["version"] for line in published] == [*range(1, adapted.versions + 1)]
    checkpoints = folder.path / "checkpoints/adapted"
    drafts = {p.name: load_file(p / "model.safetensors") for p in checkpoints.iterdir()}
    loaded = load_file(Path(config.drafter_settings.path) / "model.safetensors")
    assert drafts["a"].keys() == drafts["b"].keys() == loaded.keys()
    assert not same(drafts["a"], drafts["b"])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in drafts["c"].items())

    engine = msgspec.structs.replace(config.engine, kind="trace", trace=str(folder.path / "trace"))
    again = msgspec.structs.replace(config, engine=engine, arms=("adapted",))
    replayed = RunFolder(tmp_path / "replayed")
    replayed.create()
    assert Experiment(again).run(replayed).arms["adapted"].versions > 4


def test_memory_of_several_adapters(configure: Configure) -> None:
    """One copy of the draft for all of them; everything that is an adapter's as often as there are."""
    one, three = (
        footprint(config, *sketch(config))
        for config in (
            configure("engine.max_batch=3"),
            configure("adapt.scope.state=per_request", "engine.max_batch=3"),
        )
    )
    adapters = 3 * one.num_trained
    assert three.num_trained == adapters
    assert (three.masters, three.moments, three.first_weights) == (
        4 * adapters,
        8 * adapters,
        4 * adapters,
    )
    assert three.trainer_copy == 4 * (three.num_draft_parameters + adapters)
    assert three.serving_adapters == 4 * adapters
    assert three.last_good == 2 * 4 * adapters
    assert (three.merged, one.serving_adapters) == (0, 0)
    assert three.replay == one.replay


def test_a_buffer_too_small_for_all_adapters(configure: Configure) -> None:
    """What the buffer may hold is shared out, and too little of it is no request for anybody."""
    scope = "adapt.scope={state: per_tenant, tenants: [a, b, c]}"
    for key, value in (("max_tokens", 160), ("max_bytes", 1 << 20)):
        fits = configure(f"adapt.memory.{key}={value}")
        footprint(fits, *sketch(fits))
        config = configure(scope, f"adapt.memory.{key}={value}")
        with pytest.raises(ConfigError, match=rf"{key}: {value} holds no .* each of 3 adapters"):
            footprint(config, *sketch(config))
