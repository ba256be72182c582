"""Which parameters a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from cosched.protocols import Drafter


def parameters_of(drafter: Drafter, kind: str) -> tuple[str, ...]:
    """Names of the parameters of a scope.

    Raises:
        ConfigError: the drafter has no such scope, or it is empty.
    """
    scopes = drafter.scopes()
    if kind not in scopes:
        raise ConfigError(
            f"adapt.scope.kind: {kind!r} is no scope of this drafter, which has {', '.join(scopes)}"
        )
    if not scopes[kind].parameters:
        raise ConfigError(f"adapt.scope.kind: {kind!r} of this drafter has no parameters to train")
    return scopes[kind].parameters
