"""From a configuration to the parts of SGLang's arms, and of an adaptation inside SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.engines.embedded.target import load_end_tokens, load_tokenizer
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.sglang.launcher.arm import ServedEngine
from cosched.engines.sglang.launcher.launch import check_draft_servable
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.errors import ConfigError
from cosched.loop.publish import InPlacePublisher, Serving
from cosched.memory.footprint import footprint, own_keys, sketch
from cosched.registry import DRAFTERS, POLICIES
from cosched.settings.arms import PLAIN, adapts, split_arm
from cosched.workload.requests import load_requests

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.engines.embedded.judges import ForcedKind
    from cosched.engines.request import GenerationRequest
    from cosched.engines.sglang.worker.adaptation import Operator
    from cosched.engines.sglang.worker.adapted import WorkerParts
    from cosched.protocols import Drafter, Sink
    from cosched.records import RoundRow
    from cosched.settings.schema import Config, PublishSettings


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
    footprint(config, target, drafter)  # what does not fit is named before anything is loaded
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
    world: ServedWorld, name: str, sink: Sink, on_tokens: Callable[[int], None]
) -> ServedArm:
    """An arm that SGLang decodes, with the settings that its name asks for."""
    config, (base, windowed) = world.config.for_arm(name), split_arm(name)
    drafter = msgspec.structs.replace(
        config.drafter_settings, window=config.drafter_settings.window if windowed else None
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
    return ServedArm(name, ServedEngine(config, speculation, sampling, sink, on_tokens))


def build_adaptation(
    config: Config, parts: WorkerParts, operator: Operator, sink: Sink, with_rounds: bool
) -> Adaptation:
    """The co-scheduler of a worker inside SGLang; ``with_rounds`` tells the sink every round.

    Raises:
        CoschedError: the draft cannot be trained there, or the settings do not fit it.
    """
    parts.check()
    settings = msgspec.structs.replace(
        config.drafter_settings, num_draft_tokens=parts.num_draft_tokens
    )
    with torch.random.fork_rng():  # what SGLang samples must not depend on us
        drafter: Drafter = DRAFTERS.get(settings.kind).load(settings, parts.target)
        trains = getattr(POLICIES.get(config.policy_settings.kind), "trains", True)
        publisher = _publisher_into(parts, drafter, config.adapt.publish) if trains else None
        coscheduler = build_coscheduler(
            config, parts.target, drafter, publisher, settings.window, sink, parts.ranks
        )

    def save(directory: Path) -> None:
        adapted = drafter.clone(parts.target.embedding.weight.dtype)
        weights = publisher.weights_of(publisher.version) if publisher else {}
        network = adapted.network()
        assert network is not None
        network.load_state_dict(weights, strict=False)
        adapted.save(directory)

    def on_row(row: RoundRow) -> None:
        sink.emit("round", row=row)

    return Adaptation(
        algorithm=parts.algorithm,
        coscheduler=coscheduler,
        collector=RoundCollector(on_row if with_rounds else None),
        ranks=parts.ranks,
        watches=trains,
        window=config.adapt.replay.window,
        save=save,
        operator=operator,
        sink=sink,
    )


def _publisher_into(
    parts: WorkerParts, drafter: Drafter, settings: PublishSettings
) -> InPlacePublisher:
    """Into SGLang's draft model, on all ranks alike."""
    network = drafter.network()
    if network is None:
        raise ConfigError("drafter.kind: this drafter has no network that SGLang could serve")
    first = {name: p.detach() for name, p in network.named_parameters()}
    served = parts.serve(first)
    ranks = parts.ranks
    serving = Serving(
        draft=served.tensors,
        target=parts.target.tensors(),
        share=served.share,
        agree=ranks.agree if ranks.size > 1 else None,
        refresh=parts.refresh,
    )
    return InPlacePublisher(serving, first, settings.target_check_every, settings.keep)
