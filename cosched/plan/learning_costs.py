"""What an update takes, of the trainer and of who decodes, and how often there is one."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cosched.errors import ConfigError
from cosched.guard.settings import ShadowSettings
from cosched.plan.figures import Figure, missing
from cosched.plan.roofline import count_step
from cosched.plan.run import round_costs

if TYPE_CHECKING:
    from cosched.plan.run import Run
    from cosched.plan.subject import Subject
    from cosched.settings.schema import Config

FIXED = {"every_n_rounds": "rounds", "every_n_tokens": "tokens"}
"""Policies that go by a number alone, and the name of that setting."""


def updates(subject: Subject, run: Run | None) -> tuple[Figure, Figure]:
    """An update with rows of one request, and of as many as it has room for.

    Each request that is sampled from brings a context of its own, which the draft runs over: what was
    measured is scaled by the operations of a micro-step, counted for both.
    """
    asked, most = subject.asked, subject.most_sampled
    if asked.update_seconds is not None:
        one = Figure(asked.update_seconds, "given", "plan.update_seconds")
        return one, one
    if run is None and asked.device is None:
        raise missing("update_seconds", "an update")
    steps = _num_steps(subject.config)
    few, many = (count_step(subject.config, subject.target, subject.drafter, n) for n in (1, most))
    if (roofline := subject.roofline) is not None:
        why = f"operations, bytes and launches on {asked.device}"
        return (
            Figure(roofline.update_seconds(few, steps), "counted", why),
            Figure(roofline.update_seconds(many, steps), "counted", why),
        )
    assert run is not None, "refused above"
    found = _busy(run).times(asked.update_factor, "by plan.update_factor")
    at = max(1, min(round(run.requests), most))
    before = (
        _num_steps(run.config) * count_step(run.config, subject.target, subject.drafter, at).flops
    )
    return _scaled(found, steps * few.flops / before), _scaled(found, steps * many.flops / before)


def _num_steps(config: Config) -> int:
    return getattr(config.policy_settings, "num_steps", 1)


def _scaled(found: Figure, ratio: float) -> Figure:
    return (
        found if np.isclose(ratio, 1.0) else found.times(ratio, f"by its operations: {ratio:.3g}")
    )


def _busy(run: Run) -> Figure:
    """What a trainer is busy with an update, the guard's look included; the first warms up."""
    learning = run.learning
    if learning.busy_seconds:
        own = learning.busy_seconds[1:] or learning.busy_seconds
        return Figure(fmean(own), "measured", f"{len(own)} updates, with what judged them")
    own = learning.update_seconds[1:] or learning.update_seconds
    look = run.summary.arms[run.arm].guard_seconds / learning.updates
    if run.config.adapt.trainer.background and learning.look_rounds:
        look = fmean(learning.look_rounds) * round_costs(run, run.control, per_request=False)[0]
    why = f"{len(own)} updates, {1e3 * look:.3g} ms of it what judged them"
    return Figure(fmean(own) + look, "measured", why)


def exposed(subject: Subject, run: Run | None, update: Figure, publish: Figure) -> Figure:
    """What decoding waits, or is slowed, for an update in its own process, its publication included."""
    if subject.elsewhere:
        return Figure(0.0, "counted", "nothing: a sidecar trains")
    asked, beside = subject.asked, subject.config.adapt.trainer.background
    alike = run is not None and not run.elsewhere and run.config.adapt.trainer.background == beside
    if run is None or not alike or asked.update_seconds is not None or asked.device is not None:
        if beside:
            return Figure(
                publish.value, "assumed", "publication alone: the rest goes on beside the rounds"
            )
        return Figure(update.value + publish.value, update.how, "an update and its publication")
    arm, number = run.arms[run.arm], run.learning.updates
    usual = round_costs(run, run.control, per_request=False)[0]
    slower = arm.seconds("draft", "verify", "other") - usual * arm.batches(run.max_batch)
    waited = arm.seconds("update", "publish")
    why = f"{1e3 * waited / number:.3g} ms waited for, {1e3 * slower / number:.3g} ms by slower rounds"
    found = Figure(max(0.0, waited + slower) / number, "measured", why)
    return found.times(asked.update_factor, "by plan.update_factor")


def cadence(config: Config, run: Run | None) -> Figure:
    """Rounds, or tokens, from one update to the next, if nothing is in the way."""
    policy = config.policy_settings
    if policy.kind in FIXED:
        key = FIXED[policy.kind]
        return Figure(getattr(policy, key), "given", f"adapt.policy: {key} between updates")
    if run is None:
        raise ConfigError(
            f"{config.adapt_key}.policy.kind: {policy.kind} decides by what it sees, so a run has to show how "
            f"often it trains (--from RUN_FOLDER); or use every_n_rounds"
        )
    theirs = run.config.policy_settings
    if theirs != policy:
        raise ConfigError(
            f"{config.adapt_key}.policy: {policy.kind} decides by what it sees, and {run.folder} was run "
            f"with {theirs.kind} or other settings of it; run one with the same"
        )
    rounds = run.arms[run.arm].batches(run.max_batch) / run.learning.updates
    return Figure(rounds, "assumed", f"rounds between updates, as {policy.kind} chose in the run")


def per_version(config: Config, run: Run | None) -> Figure:
    """Updates of a version, on the mean."""
    if run is not None and run.learning.published:
        ratio = run.learning.updates / run.learning.published
        return Figure(max(1.0, ratio), "measured", "updates a version")
    if isinstance(config.adapt.guard, ShadowSettings):
        return Figure(2.0, "assumed", "updates a version, by a guard that waits for evidence")
    return Figure(1.0, "counted", "updates a version")


def first_version(run: Run | None) -> Figure:
    """Updates before something that was learnt serves."""
    learnt = [] if run is None else sorted(filter(None, run.learning.contained.values()))
    if not learnt:
        return Figure(1, "assumed", "updates before something learnt serves")
    return Figure(learnt[0], "measured", "updates before something learnt served")
