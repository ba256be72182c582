"""Which settings make learning what it is: one that has been saved goes on with no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import ConfigError
from cosched.settings.load import resolved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cosched.settings.schema import Config

SECTIONS = ("policy", "loss", "objective", "replay", "scope", "trainer", "guard")
FREE = {"drafter.path", "adapt.trainer.limit_seconds", "adapt.trainer.restarts"}
"""Not compared: where the draft is (its weights are), and how patient one is."""


def learning_settings(config: Config) -> dict[str, Any]:
    """Every setting that what is learnt depends on, by its key, as JSON holds it."""
    whole = resolved(config)
    learning = {
        "run.seed": whole["run"]["seed"],
        "engine.dtype": whole["engine"]["dtype"],
        "drafter": whole["drafter"],
        **{f"adapt.{section}": whole["adapt"][section] for section in SECTIONS},
    }
    found = {key: value for key, value in _leaves("", learning) if key not in FREE}
    return msgspec.json.decode(msgspec.json.encode(found))


def check_same_learning(was: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Make sure that learning that was saved ``where`` goes on as what it was.

    Raises:
        ConfigError: a setting is another; the message has its key, what it was and what it is.
    """
    for key, old, new in differing(was, now):
        raise ConfigError(
            f"{key}: what was saved in {where} was learnt with {_shown(old)}, and now it is "
            f"{_shown(new)}; set it as it was, or start without --resume"
        )


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each key whose setting is another, with both."""
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            yield key, was.get(key), now.get(key)


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _leaves(at: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{at}.{key}".lstrip("."), inner)
    else:
        yield at, value
