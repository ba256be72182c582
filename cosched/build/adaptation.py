"""From a configuration to an adaptation inside SGLang's scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.autosave import Autosave
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.engines.sglang.worker.lengths import ServedLengths
from cosched.errors import ConfigError, RunFolderError
from cosched.loop.lengths import DraftLengths
from cosched.loop.publish import InPlacePublisher, Serving
from cosched.registry import DRAFTERS, LENGTHS, POLICIES
from cosched.telemetry.whole_folder import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.engines.sglang.worker.adaptation import Operator
    from cosched.engines.sglang.worker.adapted import WorkerParts
    from cosched.loop.roles import Sink
    from cosched.protocols import Drafter
    from cosched.records import RoundRow
    from cosched.settings.schema import Config
    from cosched.settings.sections import PublishSettings


def build_adaptation(
    config: Config,
    parts: WorkerParts,
    operator: Operator,
    sink: Sink,
    with_rounds: bool,
    checkpoints: Path | None = None,
) -> Adaptation:
    """The co-scheduler of a worker inside SGLang; ``with_rounds`` tells the sink every round.

    It saves into ``checkpoints`` unasked, as ``adapt.publish`` says; None is nowhere.

    Raises:
        CoschedError: the draft cannot be trained there, or the settings do not fit it.
    """
    lengths = _lengths(config, parts.num_draft_tokens)
    parts.check(lengths is not None)
    settings = msgspec.structs.replace(
        config.drafter_settings, num_draft_tokens=parts.num_draft_tokens
    )
    with torch.random.fork_rng():  # what SGLang samples must not depend on us
        drafter: Drafter = DRAFTERS.get(settings.kind).load(settings, parts.target)
        trains: bool = POLICIES.get(config.policy_settings.kind).trains
        publisher = _publisher_into(parts, drafter, config.adapt.publish) if trains else None
        coscheduler = build_coscheduler(
            config,
            parts.target,
            drafter,
            publisher,
            settings.window,
            sink,
            parts.ranks,
            parts.acceptance,
        )

    def save(directory: Path) -> None:
        try:
            adapted = drafter.clone(parts.target.embedding.weight.dtype)
        except RuntimeError as error:  # the device's memory, which requests need more than a save
            raise RunFolderError(f"{directory}: no copy of the draft to save: {error}") from error
        weights = publisher.weights_of(publisher.version) if publisher else {}
        network = adapted.network()
        assert network is not None
        network.load_state_dict(weights, strict=False)
        write_whole(directory, adapted.save)

    def on_row(row: RoundRow) -> None:
        sink.emit("round", row=row)

    publish = config.adapt.publish
    autosave = None
    if checkpoints is not None and publisher is not None:
        autosave = Autosave(
            checkpoints, save, publish.save_every, publish.save_at_end, publish.saves_kept
        )
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
        autosave=autosave,
        lengths=lengths,
    )


def _lengths(config: Config, max_tokens: int) -> ServedLengths | None:
    """How many tokens rounds draft; None where it is always as many as SGLang was started for."""
    settings = config.length_settings
    policy = LENGTHS.get(settings.kind)(settings)
    choices = policy.choices(max_tokens)
    if choices == (max_tokens,):
        return None
    if choices[-1] > max_tokens:
        raise ConfigError(
            f"--speculative-num-steps {max_tokens}: drafter.length may draft {choices[-1]} tokens"
        )
    # In SGLang a draft runs over what a round committed before the next, whatever was drafted.
    return ServedLengths(DraftLengths(policy, max_tokens, keeps_up=True), choices, max_tokens)


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
