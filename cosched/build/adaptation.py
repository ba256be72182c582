"""From a configuration to an adaptation inside SGLang's scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.build.resuming import go_on, origin_of
from cosched.coscheduler import Coscheduler
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.engines.sglang.worker.lengths import ServedLengths
from cosched.engines.sglang.worker.saving import Saving
from cosched.errors import ConfigError, RunFolderError
from cosched.loop.lengths import DraftLengths
from cosched.loop.publish import InPlacePublisher, Serving
from cosched.loop.tee import Tee
from cosched.registry import DRAFTERS, LENGTHS, POLICIES
from cosched.telemetry.saved_states import SavedStates
from cosched.telemetry.tally import Tally
from cosched.telemetry.whole_folder import write_whole
from cosched.training.lasting import LastingTrainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.engines.sglang.worker.adapted import WorkerParts
    from cosched.engines.sglang.worker.operator import Operator
    from cosched.engines.sglang.worker.texts import Texts
    from cosched.loop.roles import Sink
    from cosched.protocols import Drafter
    from cosched.records import RoundRow
    from cosched.settings.schema import Config
    from cosched.settings.sections import PublishSettings
    from cosched.sidecar.follower import Follower
    from cosched.telemetry.trackers.curves import Curves
    from cosched.training.ranks import Ranks


def build_adaptation(
    config: Config,
    parts: WorkerParts,
    operator: Operator,
    sink: Sink,
    with_rounds: bool,
    states: Path | None = None,
    resume: Path | None = None,
    texts: Texts | None = None,
    curves: Curves | None = None,
) -> Adaptation:
    """The co-scheduler of a worker inside SGLang; ``with_rounds`` tells the sink every round.

    It saves what it learns into ``states``, as ``adapt.checkpoint`` says; None is nowhere. It goes on
    from the saved state in ``resume``, if one is named. ``texts`` keeps what clients ask, if anything does;
    ``curves`` are told what trackers draw.

    Raises:
        CoschedError: the draft cannot be trained there, the settings do not fit it, or what was saved
            is not of this target, draft or learning.
    """
    if curves is not None:
        sink = Tee(sink, curves)
    lengths = _lengths(config, parts.num_draft_tokens)
    parts.check(lengths is not None)
    settings = msgspec.structs.replace(
        config.drafter_settings, num_draft_tokens=parts.num_draft_tokens
    )
    with torch.random.fork_rng():  # what SGLang samples must not depend on us
        drafter: Drafter = DRAFTERS.get(settings.kind).load(settings, parts.target)
        trains: bool = POLICIES.get(config.policy_settings.kind).trains
        publisher = _publisher_into(parts, drafter, config.adapt.publish) if trains else None
        coscheduler = _learning(config, parts, drafter, publisher, settings.window, sink)

    served = _ServedDraft(drafter, publisher, parts.target.embedding.weight.dtype)
    tally = Tally(time.time)
    if curves is not None:
        curves.learner = coscheduler

    def count(row: RoundRow) -> None:
        tally.observe(row)
        if curves is not None:
            curves.observe(row)
        if with_rounds:
            sink.emit("round", row=row)

    def trouble() -> str | None:
        if not isinstance(coscheduler, Coscheduler):
            return coscheduler.trouble
        trainer = coscheduler.trainer
        return trainer.learner.trouble if isinstance(trainer, LastingTrainer) else None

    saving = None
    if publisher is not None and isinstance(coscheduler, Coscheduler) and (states or resume):
        origin = origin_of(config, publisher, parts.ranks.size)
        kept = _held(config, states, parts.ranks)
        if resume is not None:
            go_on(coscheduler, resume, origin, parts.ranks.rank)
        if states is not None:
            checkpoint, write = config.adapt.checkpoint, served.to_write
            saving = Saving(coscheduler, checkpoint, origin, parts.ranks, kept, write)
    return Adaptation(
        algorithm=parts.algorithm,
        coscheduler=coscheduler,
        collector=RoundCollector(count),
        ranks=parts.ranks,
        watches=trains,
        window=config.adapt.replay.window,
        save=served.save,
        operator=operator,
        sink=sink,
        tally=tally,
        saving=saving,
        trouble=trouble,
        lengths=lengths,
        texts=texts,
        curves=curves,
    )


def _learning(
    config: Config,
    parts: WorkerParts,
    drafter: Drafter,
    publisher: InPlacePublisher | None,
    window: int | None,
    sink: Sink,
) -> Coscheduler | Follower:
    """What is told of every round: the co-scheduler, or what passes it on to a trainer elsewhere."""
    acceptance, ranks = parts.acceptance, parts.ranks
    if config.adapt.placement == "colocated" or publisher is None:
        return build_coscheduler(
            config, parts.target, drafter, publisher, window, sink, ranks, acceptance
        )
    from cosched.build.follower import build_follower  # with ZeroMQ, which nothing else needs

    return build_follower(
        config,
        parts.target,
        drafter,
        publisher,
        window,
        sink,
        acceptance,
        tells=False,  # the worker warns of the follower's trouble with others
        ranks=ranks,
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


@dataclass(frozen=True, slots=True)
class _ServedDraft:
    """The draft as it serves, to be written as a checkpoint in its public format."""

    drafter: Drafter
    publisher: InPlacePublisher | None
    dtype: torch.dtype

    def copy(self) -> Drafter:
        publisher, copy = self.publisher, self.drafter.clone(self.dtype)
        weights = publisher.weights_of(publisher.version) if publisher else {}
        network = copy.network()
        assert network is not None
        network.load_state_dict(weights, strict=False)
        return copy

    def save(self, directory: Path) -> None:
        """Write it now, whole.

        Raises:
            RunFolderError: the disk refuses, or the device has no room for a copy.
        """
        try:
            copy = self.copy()
        except RuntimeError as error:  # the device's memory, which requests need more than a save
            raise RunFolderError(f"{directory}: no copy of the draft to save: {error}") from error
        write_whole(directory, copy.save)

    def to_write(self) -> Callable[[Path], None]:
        """A copy in the host's memory, which writes itself later."""
        copy = self.copy()
        network = copy.network()
        assert network is not None
        network.to("cpu")
        return copy.save


def _held(config: Config, folder: Path | None, ranks: Ranks) -> SavedStates | None:
    """Where the first rank saves: all take, it writes."""
    if folder is None or ranks.rank:
        return None
    states = SavedStates(folder, config.adapt.checkpoint.keep)
    states.hold()
    return states


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
