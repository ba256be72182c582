"""Which parameters a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cosched.errors import ConfigError
from cosched.records import LORA, Scope
from cosched.training.lora import Lora, find_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import Drafter


class ScopeChoice(Protocol):
    """What ``adapt.scope`` says of which parameters learn."""

    @property
    def kind(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def targets(self) -> Sequence[str] | None: ...


def lora_of(drafter: Drafter, settings: ScopeChoice) -> Lora | None:
    """The adapters of ``adapt.scope``; None where it trains parameters themselves.

    Raises:
        ConfigError: its targets match no layer of this drafter.
    """
    network = drafter.network()
    if settings.kind != LORA or network is None:
        return None
    return Lora(find_layers(network, settings.targets), settings.rank, settings.alpha)


def scope_of(drafter: Drafter, settings: ScopeChoice) -> Scope:
    """The parameters that publications change, and whether the draft's KV cache stays exact.

    With LoRA, those that its adapters are merged into: the cache does where no key is made of them.

    Raises:
        ConfigError: the drafter has no such scope, or it is empty.
    """
    if (lora := lora_of(drafter, settings)) is None:
        return drafter.scopes()[_checked(drafter, settings.kind)]
    exact = {name for s in drafter.scopes().values() if s.keeps_cache for name in s.parameters}
    return Scope(lora.merged, keeps_cache=exact.issuperset(lora.merged))


def parameters_of(drafter: Drafter, kind: str) -> tuple[str, ...]:
    """Names of the parameters of one of the drafter's own scopes.

    Raises:
        ConfigError: the drafter has no such scope, or it is empty.
    """
    return drafter.scopes()[_checked(drafter, kind)].parameters


def _checked(drafter: Drafter, kind: str) -> str:
    scopes = drafter.scopes()
    if kind not in scopes:
        raise ConfigError(
            f"adapt.scope.kind: {kind!r} is no scope of this drafter, which has "
            f"{', '.join([*scopes, LORA])}"
        )
    if not scopes[kind].parameters:
        raise ConfigError(f"adapt.scope.kind: {kind!r} of this drafter has no parameters to train")
    return kind
