"""From a configuration to the two sides of ``adapt.placement: sidecar``."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.build.follower import key_of, nothing_to_train, row_form, slot_bytes_of
from cosched.build.resuming import go_on, origin_of
from cosched.build.tables import read_tables
from cosched.build.trainer import build_rehearsed
from cosched.engines.sglang.worker.saving import Saving
from cosched.errors import ConfigError, RunFolderError
from cosched.loop.publish import InPlacePublisher
from cosched.registry import DRAFTERS
from cosched.settings.arms import ADAPTED, split_arm
from cosched.settings.device import check_there, device_of
from cosched.settings.learning import differing
from cosched.settings.serving import acceptance_of
from cosched.sidecar.learning import FirstRank, Learning, OtherRank
from cosched.sidecar.messages import FromServer, Hello
from cosched.sidecar.service import Limits, Service
from cosched.sidecar.sockets import listening
from cosched.sidecar.versions import Lineage, Versions
from cosched.sidecar.weights import bytes_of
from cosched.sidecar.wire import Codec
from cosched.telemetry.run_folder import RunFolder, trainer_folder
from cosched.telemetry.saved_states import SavedStates
from cosched.training.background import BackgroundScorer, BackgroundTrainer
from cosched.training.ranks import rank_and_size, started_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.build.tables import Tables
    from cosched.coscheduler import Coscheduler
    from cosched.loop.learner_state import Origin
    from cosched.loop.roles import Scorer, Sink, Trainer
    from cosched.protocols import Drafter
    from cosched.records import Acceptance
    from cosched.settings.schema import Config
    from cosched.sidecar.messages import RowForm
    from cosched.sidecar.servers import TrainerStatus
    from cosched.sidecar.service import OnRound
    from cosched.training.ranks import Ranks

logger = logging.getLogger("cosched")

KEYS = {
    "window": "drafter.window (which cosched train has with --arm adapted+window, and always in SGLang)",
    "acceptance": "engine.acceptance (in SGLang engine.arguments.speculative_use_rejection_sampling)",
    "num_draft_tokens": "drafter.num_draft_tokens",
    "form": "engine.dtype, adapt.replay.teacher or adapt.replay.teacher_top_k",
}
"""Which settings what a server says of its engine is of."""

STATUS = "status.json"
MOST_SLOTS = 4096  # of a server, as adapt.sidecar.queue_rounds


def build_sidecar(
    config: Config, arm: str, resume: bool, sink: Sink, on_round: OnRound | None = None
) -> Service | OtherRank:
    """A trainer for servers whose draft sees what that ``arm``'s does; ``resume`` goes on from its saves.

    ``on_round`` is told of every server's rounds. Of several ranks that a launcher has started the first hears
    servers.

    Raises:
        CoschedError: a setting or file is wrong, the address is taken, or what was saved does not fit.
    """
    config, window = _of_arm(config, arm)
    settings = config.adapt.sidecar
    device = _device(settings.device, f"{config.adapt_key}.sidecar.device")
    ranks = started_ranks(device)
    folder = RunFolder(trainer_folder(config.run_folder))
    states = SavedStates(folder.path, config.adapt.checkpoint.keep)
    if ranks.rank == 0:
        states.hold()
        if not resume:
            _check_none_saved(states)
    target, own = read_tables(config, device), config.drafter_settings
    drafter: Drafter = DRAFTERS.get(own.kind).load(own, target)
    if drafter.network() is None:
        raise nothing_to_train(config)
    publisher = _publisher(config, target, drafter, ranks)
    origin = origin_of(config, publisher, ranks.size)
    agreement = _Agreement(
        draft=origin.draft,
        settings=origin.settings,
        window=window,
        acceptance=acceptance_of(config),
        num_draft_tokens=drafter.num_draft_tokens,
        form=row_form(config, target, drafter),
    )
    lineage, acceptance = Lineage(sink), agreement.acceptance
    learner = _learner(config, target, drafter, acceptance, ranks)
    coscheduler = build_coscheduler(
        config, target, drafter, publisher, window, lineage, ranks, acceptance, learner
    )
    if resume:
        _go_on(coscheduler, states, origin, ranks)
    codec: Codec[FromServer] = Codec(key_of(config), FromServer)
    alone, keeps = ranks.size == 1, states if ranks.rank == 0 else None
    write = partial(_copied, drafter, target.embedding.weight.dtype)
    learning = Learning(
        coscheduler,
        Versions(coscheduler, publisher, lineage, codec.digest),
        Saving(coscheduler, config.adapt.checkpoint, origin, ranks, keeps, write),
        device=None if alone else device,
    )
    if ranks.rank:
        return OtherRank(learning, ranks)

    def show(status: TrainerStatus) -> None:
        folder.write(STATUS, msgspec.json.encode(status))

    slot_bytes = slot_bytes_of(config, drafter, agreement.form)
    comes_to = device if alone else torch.device("cpu")  # from where it goes to all
    memory, silence_s = MOST_SLOTS * 2 * slot_bytes, settings.limit_seconds
    return Service(
        listening(settings.address or "", max(slot_bytes, bytes_of(publisher.served))),
        codec,
        learning if alone else FirstRank(learning, ranks),
        agreement,
        Limits(memory, silence_s, target.vocab_size, comes_to),
        show,
        on_round=on_round,
    )


def _of_arm(config: Config, arm: str) -> tuple[Config, int | None]:
    """The settings of that arm, and the window that its draft has.

    Raises:
        ConfigError: it does not learn, or not in a trainer of its own.
    """
    base, windowed = split_arm(arm)
    if base not in {ADAPTED, *config.for_arm(arm).variants}:
        raise ConfigError(
            f"--arm: {arm!r} does not learn; take {ADAPTED}, or a variant of the file"
        )
    windowed |= config.engine.kind == "sglang"
    config = config.for_arm(arm)
    if config.adapt.placement != "sidecar":
        raise ConfigError(
            f"{config.adapt_key}.placement: cosched train is for sidecar, got {config.adapt.placement}; "
            f"set it so, for the servers too"
        )
    return config, config.drafter_settings.window if windowed else None


def _publisher(config: Config, target: Tables, drafter: Drafter, ranks: Ranks) -> InPlacePublisher:
    """Into the trainer's own draft, which stands for that of all servers."""
    network, settings = drafter.network(), config.adapt.publish
    assert network is not None
    return InPlacePublisher.of_modules(
        network,
        torch.nn.ModuleList((target.embedding, target.head)),
        settings.target_check_every,
        settings.keep,
        agree=ranks.agree if ranks.size > 1 else None,
    )


def _device(name: str, key: str) -> torch.device:
    """Of this process: the ranks of a launcher have a GPU each.

    Raises:
        ConfigError: it is not there, or one is named that all of several ranks would have.
    """
    device = device_of(name)
    if device.type == "cuda" and rank_and_size()[1] > 1:
        if ":" in name:
            raise ConfigError(f"{key}: each rank takes a GPU of its own, got {name!r}; use cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    check_there(str(device), key)
    return device


def _check_none_saved(states: SavedStates) -> None:
    """Refuse to begin where the oldest of what was learnt would go for what is learnt now.

    Raises:
        RunFolderError: there are states of an earlier start.
    """
    if states.saved_at:
        raise RunFolderError(
            f"{states.folder} has what was learnt before, which would be overwritten: go on from it "
            f"with --resume, or take another run.name"
        )


def _go_on(coscheduler: Coscheduler, states: SavedStates, origin: Origin, ranks: Ranks) -> None:
    newest = ranks.from_first(states.newest() if ranks.rank == 0 else None)
    if newest is None:
        logger.warning(
            "cosched: nothing to resume in %s yet; the draft starts as loaded", states.folder
        )
        return
    go_on(coscheduler, newest, origin, ranks.rank)
    logger.info("cosched goes on from %s", newest)


def _learner(
    config: Config, target: Tables, drafter: Drafter, acceptance: Acceptance, ranks: Ranks
) -> tuple[Trainer, Scorer]:
    """Rehearsed; of one rank in a thread, so that messages are taken in meanwhile."""
    trainer, scorer = build_rehearsed(config, target, drafter, acceptance, ranks)
    if ranks.size > 1:
        return trainer, scorer
    beside = BackgroundTrainer(trainer, target.embedding.weight.device)
    return beside, BackgroundScorer(scorer, beside)


def _copied(drafter: Drafter, dtype: torch.dtype) -> Callable[[Path], None]:
    """The draft as it serves now, in the host's memory, to be written later."""
    copy = drafter.clone(dtype)
    network = copy.network()
    assert network is not None
    network.to("cpu")
    return copy.save


@dataclass(frozen=True, slots=True)
class _Agreement:
    """Whether a server says of itself what the trainer says of itself."""

    draft: str
    settings: dict[str, Any]
    window: int | None
    acceptance: Acceptance
    num_draft_tokens: int
    form: RowForm

    def __call__(self, hello: Hello) -> str | None:
        if hello.draft != self.draft:
            return (
                f"drafter.path: its draft has the checksum {hello.draft}, and the trainer's "
                f"{self.draft}; name the same"
            )
        for name, key in KEYS.items():
            theirs, own = getattr(hello, name), getattr(self, name)
            if theirs != own:
                return f"{key}: it is {theirs!r} there, and {own!r} at the trainer; set both alike"
        for key, theirs, own in differing(hello.settings, self.settings):
            return f"{key} is {theirs!r} there, and {own!r} at the trainer; set both alike"
        return None
