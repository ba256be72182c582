"""From a configuration to what a server has in the place of a co-scheduler, with a trainer elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosched.errors import ConfigError
from cosched.loop.checksum import checksum
from cosched.memory.full_size import no_teacher_rows, replay_limits
from cosched.settings.learning import learning_settings
from cosched.sidecar.follower import Follower
from cosched.sidecar.link import Link, Serving
from cosched.sidecar.messages import Hello
from cosched.sidecar.queue import RoundQueue
from cosched.sidecar.rows import Packer, form_of, size_of
from cosched.sidecar.together import Together
from cosched.sidecar.wire import read_key

if TYPE_CHECKING:
    from cosched.loop.publish import InPlacePublisher
    from cosched.loop.roles import Sink
    from cosched.protocols import Drafter, TargetInfo
    from cosched.records import Acceptance
    from cosched.settings.schema import Config
    from cosched.sidecar.messages import RowForm
    from cosched.training.ranks import Ranks


def build_follower(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    publisher: InPlacePublisher | None,
    window: int | None,
    sink: Sink,
    acceptance: Acceptance,
    tells: bool = True,
    ranks: Ranks | None = None,
) -> Follower:
    """What a server has in the place of a co-scheduler. It connects by and by, and waits for nothing.

    ``tells``: that no trainer is there goes to the sink from here. Of several ``ranks`` each has one.

    Raises:
        ConfigError: the draft has nothing that could be trained, or the key cannot be read.
    """
    if publisher is None:
        raise nothing_to_train(config)
    settings, form = config.adapt.sidecar, row_form(config, target, drafter)
    loaded = publisher.weights_of(0)
    hello = Hello(
        server="",
        draft=checksum(loaded),
        settings=learning_settings(config),
        window=window,
        acceptance=acceptance,
        num_draft_tokens=drafter.num_draft_tokens,
        form=form,
        version=0,
        checksum="",
        as_loaded=True,
    )
    together = Together(ranks) if ranks is not None and ranks.size > 1 else None
    num_slots = settings.queue_rounds if together is None or together.first else 1
    packer = Packer(form, config.adapt.replay.window, config.loss_settings.rows != "delayed")
    link = Link(
        settings.address or "",
        key_of(config),
        hello,
        RoundQueue(packer, num_slots, slot_bytes_of(config, drafter, form)),
        publisher.whole,
        Serving(0, "", as_loaded=True, weights=lambda: loaded),
        settings.limit_seconds,
    )
    return Follower(link, publisher, sink, tells, together)


def row_form(config: Config, target: TargetInfo, drafter: Drafter) -> RowForm:
    """Width and type of what is collected of a row."""
    limits = replay_limits(config, target, drafter)
    teacher_0X = no_teacher_rows(config, target, limits)
    dtype = target.embedding.weight.dtype
    width = limits.feature_row_bytes // dtype.itemsize
    return form_of(torch.empty(0, width, dtype=dtype, device="meta"), teacher_0X)


def slot_bytes_of(config: Config, drafter: Drafter, form: RowForm) -> int:
    """A prompt's rows, or a round's of all requests that run; a prefill of more prompts is divided."""
    verified = config.engine.max_batch * (drafter.num_verified + 1)
    return size_of(max(config.adapt.replay.window, verified), form)


def key_of(config: Config) -> bytes | None:
    """What messages are signed with, if with anything."""
    path = config.adapt.sidecar.key_file
    return None if path is None else read_key(Path(path))


def nothing_to_train(config: Config) -> ConfigError:
    """Of a drafter without a network."""
    return ConfigError(
        f"{config.adapt_key}.placement: sidecar trains a network, and the drafter "
        f"{config.drafter_settings.kind} has none; use colocated"
    )
