"""From a configuration to the arms that SGLang decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.engines.embedded.target import load_end_tokens, load_tokenizer
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.sglang.launcher.arm import ServedEngine
from cosched.engines.sglang.launcher.launch import check_draft_servable
from cosched.errors import ConfigError
from cosched.memory.footprint import check_fits
from cosched.memory.sketch import sketch
from cosched.settings.arms import PLAIN, WINDOW_SUFFIX, adapts, split_arm
from cosched.settings.schema import own_keys
from cosched.settings.serving import acceptance_of
from cosched.workload.requests import load_requests

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.embedded.engine import OnRow
    from cosched.engines.embedded.verifiers import ForcedKind
    from cosched.engines.request import GenerationRequest
    from cosched.loop.roles import Sink
    from cosched.records import Acceptance
    from cosched.settings.schema import Config


@dataclass(frozen=True, slots=True)
class ServedWorld:
    """What all arms share where SGLang serves them: the requests, and how they are sampled."""

    config: Config
    tokenizer: Any
    requests: list[GenerationRequest]
    sampling: SamplingParams

    @property
    def text_kind(self) -> ForcedKind:
        return "greedy" if self.sampling.greedy else "sampled"

    @property
    def acceptance(self) -> Acceptance:
        return acceptance_of(self.config)

    @property
    def forced(self) -> bool:
        return False

    @property
    def device(self) -> str:
        return self.config.engine.device


@dataclass(frozen=True, slots=True)
class ServedArm:
    """One way of decoding in SGLang: its engine knows how its draft adapted."""

    name: str
    engine: ServedEngine

    @property
    def drafter(self) -> None:
        """In another process."""

    @property
    def coscheduler(self) -> ServedEngine:
        return self.engine


def build_served_world(config: Config) -> ServedWorld:
    """Read the requests; the target is loaded by each arm's engine.

    Raises:
        CoschedError: anything that the user's files or settings get wrong.
    """
    for own in config.by_draft.values():
        with own_keys(own):
            check_draft_servable(own)
    target, drafter = sketch(config)
    check_fits(config, target, drafter)  # what does not fit is named before anything is loaded
    workload = config.workload
    if workload.prompts is None:
        raise ConfigError("workload.prompts: required, a file of prompts to answer")
    folder = config.target.folder
    tokenizer, end_tokens = load_tokenizer(folder), load_end_tokens(folder)
    requests = load_requests(
        workload, tokenizer, target.max_length, torch.device("cpu"), end_tokens
    )
    return ServedWorld(
        config, tokenizer, requests, SamplingParams(workload.temperature, workload.top_p)
    )


def build_served_arm(
    world: ServedWorld,
    name: str,
    sink: Sink,
    on_tokens: Callable[[int], None],
    on_row: OnRow | None = None,
) -> ServedArm:
    """An arm that SGLang decodes, with the settings that its name asks for."""
    config, (base, windowed) = world.config.for_arm(name), split_arm(name)
    drafter = msgspec.structs.replace(
        config.drafter_settings, window=config.drafter_settings.window if windowed else None
    )
    if (
        adapts(name)
        and config.adapt.placement == "sidecar"
        and drafter.window != config.drafter_settings.window
    ):
        raise ConfigError(
            f"{config.drafter_key}.window: a trainer of servers in SGLang learns with it, and the arm "
            f"{name} drafts without; use the arm {name}{WINDOW_SUFFIX}, or leave the window out"
        )
    policy = config.adapt.policy if adapts(name) else {"kind": "never"}
    config = msgspec.structs.replace(
        config,
        arms=(base,),
        drafter=msgspec.to_builtins(drafter),
        drafts={},
        adapt=msgspec.structs.replace(config.adapt, policy=policy),
    )
    sampling = {
        "temperature": world.sampling.temperature,
        "top_p": world.sampling.top_p,
        "ignore_eos": not config.workload.stop_at_end_of_text,
    }
    speculation = "plain" if base == PLAIN else "adapted"
    return ServedArm(name, ServedEngine(config, speculation, sampling, sink, on_tokens, on_row))
