"""The run that a plan begins from: which arms of it, and what they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosched.errors import ConfigError
from cosched.plan.behaviour import Observed
from cosched.plan.recorded import read_arms
from cosched.report.table import load_summary
from cosched.settings.arms import PLAIN, adapts, control_of
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import trainer_folder

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.plan.recorded import ArmRecord, Learning
    from cosched.settings.schema import Config
    from cosched.telemetry.metrics import RunSummary


@dataclass(frozen=True, slots=True)
class Run:
    """``config`` is as the arm that learns sees it. ``learning`` may be a trainer's, of a process of its own."""

    folder: Path
    summary: RunSummary
    config: Config
    arm: str
    control: str
    arms: dict[str, ArmRecord]
    learning: Learning

    @property
    def max_batch(self) -> int:
        return self.config.engine.max_batch

    @property
    def requests(self) -> float:
        """That ran at once, on the mean over the rounds of the frozen arm."""
        frozen = self.arms[self.control]
        return frozen.num_rounds / max(1, frozen.batches(self.max_batch))

    @property
    def elsewhere(self) -> bool:
        """Whether a process of its own trained."""
        return self.config.adapt.placement == "sidecar"

    def observed(self) -> Observed:
        """Both arms' rounds, text by text."""
        frozen, learns = self.arms[self.control].table(), self.arms[self.arm].table()
        return Observed(frozen, learns, self.config.drafter_settings.num_draft_tokens + 1)


def read_run(folder: Path, arm: str) -> Run:
    """A finished run, with an arm that learns and the same draft frozen beside it.

    Raises:
        RunFolderError: it is no finished run, or cannot be read.
        ConfigError: it has no such arms, or nothing was learnt in it.
    """
    summary = load_summary(folder)
    there = ", ".join(summary.arms)
    if not any(map(adapts, summary.arms)):
        raise ConfigError(
            f"--from {folder}: no arm of that run learns, it has {there}; a plan needs what learning costs "
            f"and brings, so run one with arms: [plain, frozen, adapted]"
        )
    if arm not in summary.arms or not adapts(arm):
        learning = ", ".join(filter(adapts, summary.arms))
        raise ConfigError(f"plan.arm: {arm!r} does not learn in {folder}; {learning} does")
    if control_of(arm) not in summary.arms:
        raise ConfigError(
            f"--from {folder}: it has {there}, and what learning brings is told by the same draft beside it "
            f"that does not learn; run one with the arm {control_of(arm)} too"
        )
    arms = read_arms(folder)
    config = load_config(folder / "config.yaml").for_arm(arm)
    learning = arms[arm].learning
    if config.adapt.placement == "sidecar":
        learning = _trainers(trainer_folder(folder), arms[arm])
    run = Run(folder, summary, config, arm, control_of(arm), arms, learning)
    if not learning.updates or not arms[arm].num_rounds or not arms[run.control].num_rounds:
        raise ConfigError(
            f"--from {folder}: the arm {arm} made {learning.updates} updates, so that nothing of learning's "
            f"cost is known; run more text, or with another adapt.policy"
        )
    return run


def _trainers(folder: Path, arm: ArmRecord) -> Learning:
    """What the trainer says of its updates; the versions that its server published are the same."""
    found = read_arms(folder)[""].learning
    found.publish_seconds = arm.learning.publish_seconds
    arm.learning.contained = found.contained
    return found


def round_costs(run: Run, arm: str, per_request: bool = True) -> tuple[float, float]:
    """Seconds of a round, of which so many for each request: least squares over groups of requests.

    Prefills and what learning takes are left out. Where all groups had as many requests at once the two
    cannot be told apart, and the second is NaN: the first then is of ``run.requests``.
    """
    record = run.arms[arm]
    groups = [group for group in record.groups.values() if group.rounds]
    batches = np.array([group.batches(run.max_batch) for group in groups], dtype=np.float64)
    rounds = np.array([group.rounds.total() for group in groups], dtype=np.float64)
    seconds = np.array(
        [sum(group.seconds[s] for s in ("draft", "verify", "other")) for group in groups]
    )
    sizes = rounds / batches
    if not per_request or sizes.max() - sizes.min() < 0.1 * sizes.mean():
        return float(seconds.sum() / batches.sum()), np.nan
    both = np.column_stack((batches, rounds))
    fixed, each = np.linalg.lstsq(both, seconds, rcond=None)[0]
    if each < 0:
        return float(seconds.sum() / batches.sum()), 0.0
    if fixed < 0:
        return 0.0, float(seconds.sum() / rounds.sum())
    return float(fixed), float(each)


def plain_speed(run: Run) -> float | None:
    """Tokens a second without a draft, as measured; None where that arm was not run."""
    plain = run.summary.arms.get(PLAIN)
    return None if plain is None or not plain.tokens_per_s else plain.tokens_per_s
