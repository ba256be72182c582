"""What ``cosched plan`` is asked: words ``plan.KEY=VALUE`` behind the file, or a section ``plan`` in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from omegaconf import DictConfig, OmegaConf

from cosched.errors import ConfigError
from cosched.settings.convert import convert
from cosched.settings.load import typed
from cosched.settings.merge import from_words, merge, read_yaml
from cosched.settings.sections import NotNegative, Positive, Section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cosched.settings.schema import Config

Above = Annotated[float, Meta(gt=0)]
Servers = Annotated[int, Meta(ge=1, le=65536)]
Gpu = Literal["a100", "h100", "h200", "b200"]


class PlanSettings(Section, frozen=True):
    """``plan``: what is to be predicted, and what is known better than from the run.

    ``servers`` are the numbers of servers that there is a line for each; ``requests`` run at once on each
    of them, always (null: ``engine.max_batch``). Answers are as long as the run's, or ``answer_tokens``
    with a spread of ``answer_spread`` (the standard deviation as a share of the mean, of a lognormal
    distribution; 0: all alike), or as ``answer_file`` says, a number a line. ``prompt_tokens`` precede an
    answer (null: ``workload.prompt_tokens``). ``arm`` is the one that learns, of the file and of the run.

    ``seconds`` are simulated, from a draft as loaded on, ``repeats`` times: each but the first on requests of the run
    drawn anew with replacement, which is where the ranges come from. ``seed`` is that of all chance.

    ``device`` has rounds and updates computed for that GPU from bytes and operations in place of what was
    measured (``cosched.plan.roofline`` says how, and from which data sheets). ``round_factor`` and ``update_factor``
    multiply what a round and an update take. What follows replaces a cost that the run has, or has not:
    ``round_seconds`` of a round of all ``requests``, ``update_seconds`` of an update with what judges it,
    ``publish_seconds`` of a server for a version, ``handover_seconds`` of a server for a round that it
    hands over, ``intake_seconds`` of the trainer for taking one in, ``link_gb_per_s`` (10⁹ bytes) between
    the trainer and all servers, in each direction.

    ``frozen_tau`` and ``learnt_tau`` replace the run's acceptance lengths, ``learning_updates`` the
    number of updates after which 63 % of the difference is there. Without a run all three are required.
    """

    servers: Annotated[tuple[Servers, ...], Meta(min_length=1)] = (1,)
    requests: Annotated[int, Meta(ge=1, le=4096)] | None = None
    answer_tokens: Annotated[int, Meta(ge=2)] | None = None
    answer_spread: NotNegative = 0.0
    answer_file: str | None = None
    prompt_tokens: Positive | None = None
    arm: str = "adapted"
    seconds: Above = 60.0
    repeats: Annotated[int, Meta(ge=1, le=100)] = 5
    seed: Annotated[int, Meta(ge=0)] = 0
    device: Gpu | None = None
    round_factor: Above = 1.0
    update_factor: NotNegative = 1.0
    round_seconds: Above | None = None
    update_seconds: NotNegative | None = None
    publish_seconds: NotNegative | None = None
    handover_seconds: NotNegative | None = None
    intake_seconds: NotNegative | None = None
    link_gb_per_s: Above | None = None
    frozen_tau: Annotated[float, Meta(ge=1)] | None = None
    learnt_tau: Annotated[float, Meta(ge=1)] | None = None
    learning_updates: Above | None = None


def load(path: Path, words: Sequence[str]) -> tuple[Config, PlanSettings]:
    """The experiment or server of a file, and what is asked of it.

    Raises:
        ConfigError: a setting is not allowed; the message names the key, what came and what is allowed.
    """
    raw = merge(read_yaml(path), from_words(words), str(path))
    own = raw.pop("plan", {})
    if isinstance(own, DictConfig):
        own = OmegaConf.to_container(own, resolve=True)
    if not isinstance(own, dict):
        raise ConfigError(f"plan: expected a section, {{key: value, …}}, got {own!r}")
    asked = convert(
        {str(key): _several(str(key), value) for key, value in own.items()}, PlanSettings, "plan"
    )
    _check(asked)
    return typed(raw, str(path)), asked


def _several(key: str, value: Any) -> Any:
    """``plan.servers=8`` is one number of servers."""
    return [value] if key == "servers" and isinstance(value, int) else value


def _check(asked: PlanSettings) -> None:
    if asked.answer_file is not None and asked.answer_tokens is not None:
        raise ConfigError(
            f"plan.answer_file: {asked.answer_file!r} says how long answers are, and so does "
            f"plan.answer_tokens: {asked.answer_tokens}; give one of them"
        )
    if asked.answer_spread and asked.answer_tokens is None:
        raise ConfigError(
            f"plan.answer_spread: {asked.answer_spread} is a spread around plan.answer_tokens, which is "
            f"not there; give both"
        )
    if asked.device is not None:
        for name in ("round_factor", "update_factor"):
            if getattr(asked, name) != 1.0:
                raise ConfigError(
                    f"plan.{name}: {getattr(asked, name)} multiplies what was measured, and "
                    f"plan.device: {asked.device} is not; give one of them"
                )


def curve_of(asked: PlanSettings) -> tuple[float, float, float] | None:
    """τ frozen, τ learnt and the updates between them, where they are given; None where a run has to.

    Raises:
        ConfigError: some of them are given, and some are not.
    """
    names = ("frozen_tau", "learnt_tau", "learning_updates")
    given = {name: getattr(asked, name) for name in names}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return given["frozen_tau"], given["learnt_tau"], given["learning_updates"]
    if len(missing) < len(names):
        there = ", ".join(f"plan.{name}" for name in names if name not in missing)
        raise ConfigError(
            f"plan.{missing[0]}: required beside {there}: the three of them are a curve"
        )
    return None
