"""Which keys a server has no use for: they are an experiment's, and refused where they are set."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from cosched.errors import ConfigError
from cosched.settings.schema import Config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.records import Acceptance

ONLY_IN_EXPERIMENTS = {
    "workload": "a server is asked by its clients",
    "arms": "a server has one draft, which learns as adapt says",
    "variants": "a server has one draft, which learns as adapt says",
    "drafts": "a server has one draft for all requests",
    "record.feature_layers": "a server records no trace",
    "record.dtype": "a server records no trace",
    "record.max_bytes": "a server records no trace",
    "engine.trace": "a server generates its text",
    "engine.live": "a server generates its text",
    "engine.pack": "SGLang lays out its own weights",
    "engine.exact": "SGLang lays out its own weights",
    "engine.acceptance": "SGLang accepts drafts by a rule of its own",
    "engine.tree_rule": "SGLang accepts drafts by a rule of its own",
    "adapt.replay.teacher_top_k": "from SGLang the last hidden states are taken, whole",
    "adapt.scope.state": "SGLang serves one draft to all",
    "adapt.scope.tenants": "SGLang serves one draft to all",
}
"""Sections and keys that only ``cosched run`` and ``cosched sweep`` read, and why a server does not."""


def is_served(key: str) -> bool:
    """Whether a server reads that key, given by its whole path."""
    return not any(f"{key}.".startswith(f"{other}.") for other in ONLY_IN_EXPERIMENTS)


def check_for_server(config: Config) -> None:
    """Refuse what only an experiment reads, where it is not as it is when left out.

    Raises:
        ConfigError: something is set that would have no effect.
    """
    usual = Config(run=config.run, target=config.target)
    for key, why in ONLY_IN_EXPERIMENTS.items():
        for changed, came in _changed(key, attrgetter(key)(config), attrgetter(key)(usual)):
            raise ConfigError(
                f"{changed}: {why}, so it would have no effect, got {came!r}; leave it out (it is for "
                f"cosched run). A server goes by run, engine, target, drafter and adapt"
            )


def _changed(key: str, own: Any, usual: Any) -> Iterator[tuple[str, Any]]:
    """Keys in a section, or the key itself, whose values are not the usual ones."""
    if isinstance(own, Struct):
        for name in own.__struct_fields__:
            yield from _changed(f"{key}.{name}", getattr(own, name), getattr(usual, name))
    elif own != usual:
        yield key, own


def acceptance_of(config: Config) -> Acceptance:
    """How the engine accepts a drafted token, as the file says.

    What SGLang drafts is the draft's best token, unless it is told to sample from the draft.
    """
    if config.engine.kind != "sglang":
        return config.engine.acceptance
    sampled = config.engine.arguments.get("speculative_use_rejection_sampling")
    return "sampled" if sampled else "target_only"
