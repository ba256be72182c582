"""What learns: full, tail and LoRA; which layers, and settings that do not fit."""

from __future__ import annotations

import msgspec
import pytest

from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.settings.schema import Config
from cosched.training.lora import find_layers
from cosched.training.scope import scope_of
from tests.helpers.adapters import Configure, examples
from tests.helpers.drafts import make_drafter


@pytest.fixture
def config(configure: Configure) -> Config:
    return configure()


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
