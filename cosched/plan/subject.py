"""What is planned for: an arm of an experiment, or a server, with its sizes from ``config.json`` files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosched.build.follower import row_form, slot_bytes_of
from cosched.errors import ConfigError
from cosched.memory.footprint import footprint
from cosched.memory.full_size import replay_limits
from cosched.memory.sketch import sketch
from cosched.plan.roofline import DEVICES, Roofline, for_requests
from cosched.settings.arms import adapts
from cosched.sidecar.rows import TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosched.memory.footprint import Footprint
    from cosched.memory.sketch import TargetSketch
    from cosched.plan.settings import PlanSettings
    from cosched.protocols import Drafter
    from cosched.settings.schema import Config
    from cosched.sidecar.messages import RowForm

TOKEN_BYTES = 8
HEAD_BYTES, HEAD_OF_REQUEST_BYTES = (
    180,
    80,
)  # of a message with rows (benchmarks/bench_plan.py intake)
DRAWN = 4096  # lengths of a distribution that is given by its mean and spread


@dataclass(frozen=True, slots=True)
class Subject:
    """``requests`` run at once on a server; the trainer samples from ``most_sampled`` of all at most.

    ``room`` is how many requests its replay buffer has rows of. A round's message has ``round_bytes`` and
    ``row_bytes`` for each row; a version has ``version_bytes``.
    """

    config: Config
    asked: PlanSettings
    target: TargetSketch
    drafter: Drafter
    sizes: Footprint
    requests: int
    lengths: NDArray[np.int64]
    prompt_rows: int
    room: int
    most_sampled: int
    row_bytes: float
    round_bytes: float
    slot_bytes: int
    version_bytes: float

    @property
    def elsewhere(self) -> bool:
        """Whether a trainer of its own learns for all servers."""
        return self.config.adapt.placement == "sidecar"

    @property
    def context(self) -> float:
        """Tokens of a running request, on the mean."""
        return self.prompt_rows + float(self.lengths.mean()) / 2

    def message_bytes(self, tau: float) -> float:
        """Of a round that commits so many tokens a request."""
        return self.round_bytes + self.row_bytes * tau * self.requests

    @property
    def roofline(self) -> Roofline | None:
        """Of ``plan.device``."""
        if self.asked.device is None:
            return None
        device = DEVICES[self.asked.device]
        return Roofline(device, self.config, self.target, self.drafter, self.sizes)

    @property
    def server_memory(self) -> int | None:
        """Bytes of a server: target, draft and caches, and learning where that is in it."""
        sizes = self.sizes
        if sizes.target is None:  # a folder without weights
            return None
        if not self.elsewhere:
            return sizes.target + sizes.target_cache + sizes.added
        draft = sizes.draft + sizes.last_good + sizes.draft_cache
        return sizes.target + sizes.target_cache + draft

    @property
    def queue_memory(self) -> int:
        """Bytes of the host's memory in which a server's rounds wait, at most."""
        return self.config.adapt.sidecar.queue_rounds * self.slot_bytes if self.elsewhere else 0

    def trainer_memory(self, servers: int) -> int | None:
        """Bytes of the process that trains, with the rows of so many servers' requests."""
        if not self.elsewhere:
            return None
        running = min(4096, servers * self.requests, self.room)
        sizes = footprint(for_requests(self.config, running), self.target, self.drafter)
        table = self.target.vocab_size * self.target.hidden_size
        tables = (
            (1 if self.target.tied else 2) * table * self.target.embedding.weight.dtype.itemsize
        )
        return sizes.added - sizes.draft_cache - sizes.draft_store - sizes.process + tables


def subject_of(config: Config, asked: PlanSettings, recorded: NDArray[np.int64] | None) -> Subject:
    """Sizes of an arm; answers are as ``asked`` or as ``recorded``.

    Raises:
        ConfigError: the arm does not learn, or learns in a way that is not planned for.
        CheckpointError: a ``config.json`` is missing or damaged.
    """
    base = asked.arm
    if not adapts(base):
        raise ConfigError(f"plan.arm: {base!r} does not learn; name an arm that does, as adapted")
    config = for_requests(config.for_arm(base), asked.requests or config.engine.max_batch)
    where = config.adapt_key
    if config.num_adapters is not None:
        raise ConfigError(
            f"{where}.scope.state: {config.adapt.scope.state} with {config.engine.max_batch} requests at "
            f"once has several adapters that learn, which is not planned for; use shared, or plan.requests=1"
        )
    target, drafter = sketch(config)
    if drafter.network() is None:
        raise ConfigError(
            f"{config.drafter_key}.kind: {config.drafter_settings.kind} learns by itself, at no cost of "
            f"updates; there is nothing to plan"
        )
    sizes = footprint(config, target, drafter)
    limits = replay_limits(config, target, drafter)
    blocks = config.loss_settings.rows != "delayed"
    form, room = row_form(config, target, drafter), limits.room(limits.request_bytes(blocks))
    requests, tokens = config.engine.max_batch, drafter.num_draft_tokens
    drafted = TOKEN_BYTES * tokens + (_width(form)[1] * tokens if blocks else 0)
    return Subject(
        config=config,
        asked=asked,
        target=target,
        drafter=drafter,
        sizes=sizes,
        requests=requests,
        lengths=_lengths(config, asked, recorded),
        prompt_rows=min(
            asked.prompt_tokens or config.workload.prompt_tokens, config.adapt.replay.window
        ),
        room=room,
        most_sampled=max(1, min(config.adapt.replay.anchors, room)),
        row_bytes=TOKEN_BYTES + sum(_width(form)),
        round_bytes=HEAD_BYTES + requests * (HEAD_OF_REQUEST_BYTES + TOKEN_BYTES + drafted),
        slot_bytes=slot_bytes_of(config, drafter, form),
        version_bytes=_published(sizes) * target.embedding.weight.dtype.itemsize,
    )


def _published(sizes: Footprint) -> float:
    """Parameters of a version: with adapters what they are merged into."""
    return sizes.merged / 4 if sizes.merged else sizes.num_trained


def _width(form: RowForm) -> tuple[int, int]:
    """Bytes of a row's features and of its teacher."""
    return (
        form.feature_width * TYPES[form.feature_type].itemsize,
        form.teacher_width * TYPES[form.teacher_type].itemsize,
    )


def _lengths(
    config: Config, asked: PlanSettings, recorded: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Tokens of answers: as asked, or as in the run, or as many as the file allows."""
    if asked.answer_file is not None:
        return _read_lengths(Path(asked.answer_file))
    if asked.answer_tokens is not None:
        return _drawn(asked.answer_tokens, asked.answer_spread, asked.seed)
    if recorded is not None:
        return recorded
    return np.array([config.workload.max_new_tokens])


def _drawn(mean: float, spread: float, seed: int) -> NDArray[np.int64]:
    """Of a lognormal distribution with that mean, and that standard deviation as a share of it."""
    if not spread:
        return np.array([round(mean)])
    variance = np.log1p(spread**2)
    random = np.random.default_rng(seed)
    drawn = random.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), DRAWN)
    return np.maximum(np.rint(drawn), 2).astype(np.int64)


def _read_lengths(path: Path) -> NDArray[np.int64]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan.answer_file: {path} cannot be read: {error}") from error
    wrong = next(
        (word for word in words if not (word.isdecimal() and 2 <= int(word) <= 1 << 24)), None
    )
    if wrong is not None or not words:
        got = "nothing" if wrong is None else repr(wrong[:40])
        raise ConfigError(
            f"plan.answer_file: {path} has to have a whole number of tokens a line, 2 at least, got {got}"
        )
    return np.array([int(word) for word in words])
