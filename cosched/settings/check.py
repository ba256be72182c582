"""What no single key of a configuration can say: whether its sections go together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.guard.settings import ShadowSettings
from cosched.records import LORA, OF_ADAPTERS
from cosched.registry import DRAFTERS, LENGTHS, LOSSES, POLICIES
from cosched.settings.arms import (
    ADAPTED,
    BASE_ARMS,
    DRAFT_MARK,
    FROZEN,
    PLAIN,
    WINDOW_SUFFIX,
    adapts,
    draft_of,
    split_arm,
)
from cosched.settings.device import check_name
from cosched.settings.sidecar import check_one_learner, check_sidecar

if TYPE_CHECKING:
    from cosched.protocols import DraftLength, LossSettings, Policy
    from cosched.settings.schema import Config
    from cosched.settings.sections import ScopeSettings

FOLDER_NAME = re.compile(r"[^\W_][\w.@-]{0,99}")


def check_together(config: Config) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: some do not; the message names their keys.
    """
    _check_names(config)
    _check_arms(config)
    workload, engine = config.workload, config.engine
    if engine.live and engine.kind != "trace":
        raise ConfigError(
            f"engine.live: true computes what a trace has, and engine.kind is {engine.kind}; use false"
        )
    if engine.exact:
        _check_exact(config)
    if engine.kind == "trace":
        if engine.trace is None:
            raise ConfigError("engine.trace: required when engine.kind is trace, a recorded folder")
    elif engine.kind == "sglang":
        if workload.documents is not None:
            raise ConfigError("workload.documents: SGLang decides its own text; use prompts")
        if engine.acceptance == "target_only":
            raise ConfigError(
                f"engine.acceptance: SGLang accepts drafts by a rule of its own, got "
                f"{engine.acceptance!r}; leave it out"
            )
    elif (workload.prompts is None) == (workload.documents is None):
        raise ConfigError("workload: give exactly one of prompts and documents")
    for key, path in (files := workload.files).items():
        if list(files.values()).count(path) > 1:
            raise ConfigError(f"{key}: the file {path} stands twice; name it once")
    if workload.samples > 1 and workload.documents is not None:
        raise ConfigError(
            f"workload.samples: a document is said one way only, got {workload.samples}; use 1"
        )
    if workload.turns > 1 and workload.documents is not None:
        raise ConfigError(
            f"workload.turns: a document is said, and asks nothing after it, got {workload.turns}; "
            f"use 1, or prompts"
        )
    for own in config.by_draft.values():
        _check_length(own)
    _check_target_runs(config)
    # The section itself is checked whether or not an arm uses it: servers have no arms.
    for arm in dict.fromkeys((ADAPTED, *(arm for arm in config.arms if adapts(arm)))):
        _check_adapt(config.for_arm(arm), used=arm in config.arms)
    check_one_learner(config)
    _check_saved_together(config)


def _check_saved_together(config: Config) -> None:
    """A run goes on with all its arms from one point."""
    places = {f"variants.{name}": adapt for name, adapt in config.variants.items()}
    for draft, own in config.drafts.items():
        places[f"drafts.{draft}.adapt"] = own.adapt
        places |= {f"drafts.{draft}.variants.{name}": one for name, one in own.variants.items()}
    for where, adapt in places.items():
        if adapt.checkpoint != config.adapt.checkpoint:
            raise ConfigError(
                f"{where}.checkpoint: a run saves all its arms at once, when adapt.checkpoint says; "
                f"set it there"
            )


def _check_names(config: Config) -> None:
    """What becomes a folder stays in its own, and a device is one that torch knows."""
    name = config.run.name
    if not FOLDER_NAME.fullmatch(name):
        raise ConfigError(
            f"run.name: a folder of that name is made in run.dir, got {name!r}; use up to 100 letters, "
            f"digits and . _ @ -, and begin with a letter or digit"
        )
    if not config.run.dir:
        raise ConfigError("run.dir: the folder that runs go into, got ''; use runs, or .")
    check_name(config.engine.device)
    if len(set(trackers := config.run.trackers)) != len(trackers):
        raise ConfigError(f"run.trackers: the same tracker twice in {list(trackers)}; name it once")


def _check_exact(config: Config) -> None:
    engine = config.engine
    if engine.kind == "sglang" or (engine.kind == "trace" and not engine.live):
        raise ConfigError(
            f"engine.exact: true is for a target that the embedded engine runs, and engine.kind is "
            f"{engine.kind}; use false"
        )
    if not engine.pack:
        raise ConfigError("engine.exact: true needs packed weights; use engine.pack: true")
    if engine.max_batch > 1:
        raise ConfigError(
            f"engine.exact: true is for one request at a time, got engine.max_batch = "
            f"{engine.max_batch}; use 1"
        )


def _check_length(config: Config) -> None:
    """A draft's length can be chosen, by seconds that are those of serving."""
    engine, kind = config.engine, config.length_settings.kind
    length, drafter = LENGTHS.get(kind)(config.length_settings), config.drafter_settings
    most = length.choices(drafter.num_draft_tokens)[-1]
    if most > drafter.num_draft_tokens:
        raise ConfigError(
            f"{config.drafter_key}.length: it may draft {most} tokens, and "
            f"{config.drafter_key}.num_draft_tokens, the most, is {drafter.num_draft_tokens}"
        )
    if engine.kind == "sglang" and kind != "fixed":
        _check_served_length(config, length)
    if engine.kind == "trace" and not engine.live and LENGTHS.get(kind).needs_seconds:
        raise ConfigError(
            f"{config.drafter_key}.length.kind: {kind} weighs the seconds of verification, which a "
            f"trace does not take; use engine.live: true, or threshold or fixed"
        )


def _check_target_runs(config: Config) -> None:
    """A trace has rows of the target, and no layers to draft with."""
    if config.engine.kind != "trace" or config.engine.live:
        return
    for key, settings in config.all_drafters.items():
        if DRAFTERS.get(settings.kind).needs_target:
            raise ConfigError(
                f"{key}.kind: {settings.kind} drafts with the target, which a trace does not run; use "
                f"engine.live: true"
            )


def _check_served_length(config: Config, length: DraftLength) -> None:
    """SGLang drafts as many tokens for every request of a round, and some of its workers always."""
    kinds = {plugin.name: plugin.cls.sglang for plugin in DRAFTERS.plugins()}
    can = [name for name, worker in kinds.items() if worker and worker.changes_length]
    key, kind = f"{config.drafter_key}.length.kind", config.length_settings.kind
    if config.drafter_settings.kind not in can:
        raise ConfigError(
            f"{key}: in SGLang {config.drafter_settings.kind} drafts as many tokens as it was started "
            f"for, got {kind}; use fixed ({', '.join(can)} can change it)"
        )
    if length.by_request:
        raise ConfigError(
            f"{key}: SGLang drafts as many tokens for every request of a round, and {kind} goes by "
            f"request; use goodput or fixed"
        )
    worker = kinds[config.drafter_settings.kind]
    assert worker is not None
    if (width := worker.width_of(config.drafter_settings)) > 1:
        raise ConfigError(
            f"{key}: SGLang changes how long a chain is, not a tree, got {kind} with "
            f"{config.drafter_key}.{worker.width}: {width}; use fixed, or {worker.width}: 1"
        )


def _check_arms(config: Config) -> None:
    for arm in config.arms:
        (base, windowed), draft, own = split_arm(arm), draft_of(arm), config.for_arm(arm)
        names = [*BASE_ARMS, *own.variants]
        if draft is not None:
            names.remove(PLAIN)
        if base not in names or (base == PLAIN and windowed) or draft not in {None, *config.drafts}:
            raise ConfigError(f"arms: unknown arm {arm!r}; there are {_arms_there(config)}")
        if windowed and own.drafter_settings.window is None:
            raise ConfigError(
                f"arms: {arm!r} needs {own.drafter_key}.window, the tokens that the draft sees"
            )
    if len(set(config.arms)) != len(config.arms):
        raise ConfigError(f"arms: the same arm twice in {list(config.arms)}")


def _arms_there(config: Config) -> str:
    own = [*BASE_ARMS, *config.variants] if config.drafter is not None else [PLAIN]
    for name, draft in config.drafts.items():
        own += [f"{name}{DRAFT_MARK}{base}" for base in (FROZEN, ADAPTED, *draft.variants)]
    learning = ", ".join(name for name in own if name != PLAIN)
    return f"{', '.join(own)}, and with {WINDOW_SUFFIX} behind them {learning}"


def _check_adapt(config: Config, used: bool) -> None:
    """Whether what an arm does to learn fits the text and the engine."""
    drafter, loss, where = config.drafter_settings, config.loss_settings, config.adapt_key
    _ = config.policy_settings
    _check_teaches(loss, f"{where}.loss")
    _check_experts(config)
    engine, replay, memory = config.engine, config.adapt.replay, config.adapt.memory
    if loss.rows == "all":
        if engine.kind == "trace":
            raise ConfigError(
                f"{where}.loss.rows: 'all' needs rows after a refusal, which a trace does not have; "
                f"use 'accepted', 'refused' or 'delayed', or engine.kind: embedded"
            )
        if config.workload.documents is not None:
            raise ConfigError(f"{where}.loss.rows: 'all' needs drafted text; documents are forced")
    if config.adapt.scope.state != "shared" and engine.kind == "sglang":
        raise ConfigError(f"{where}.scope.state: SGLang serves one draft to all; use shared")
    if used:
        _check_scope(config)
    if replay.window > memory.max_tokens:
        raise ConfigError(
            f"{where}.memory.max_tokens: {memory.max_tokens} holds no request of "
            f"{where}.replay.window = {replay.window} rows"
        )
    if replay.window <= drafter.num_draft_tokens + 1:
        raise ConfigError(
            f"{where}.replay.window: {replay.window} holds no path of "
            f"{config.drafter_key}.num_draft_tokens = "
            f"{drafter.num_draft_tokens} tokens behind an anchor; use at least "
            f"{drafter.num_draft_tokens + 2}"
        )
    trainer = config.adapt.trainer
    if trainer.offload_optimizer and trainer.zero_stage == 0:
        raise ConfigError(
            f"{where}.trainer.zero_stage: it is ZeRO that offloads ({where}.trainer.offload_optimizer), in stages "
            f"1 and 2, got 0; use auto"
        )
    _check_guard(config)
    _check_finished(config)
    check_sidecar(config)


def _check_finished(config: Config) -> None:
    """A policy that learns from finished requests finds them."""
    settings, where = config.policy_settings, config.adapt_key
    if config.adapt.replay.keep_finished:
        return
    policy: Policy = POLICIES.get(settings.kind)(settings)
    if policy.needs_finished:
        why = f"{where}.policy.kind = {settings.kind} learns from finished requests"
    elif policy.idle_steps:
        why = f"{where}.policy.idle_steps = {policy.idle_steps} are taken when all requests have finished"
    else:
        return
    raise ConfigError(f"{where}.replay.keep_finished: {why}, got false; use true")


def _check_teaches(loss: LossSettings, where: str) -> None:
    if LOSSES.get(loss.kind)(loss).teaches:
        return
    if hasattr(loss, "terms"):
        raise ConfigError(
            f"{where}.terms: none of those with a weight looks at the target, so the draft would "
            f"stay as it is; add one that does, as forward_kl"
        )
    raise ConfigError(
        f"{where}.kind: {loss.kind!r} does not look at the target, so the draft would stay "
        f"as it is; make it a term of `sum`, beside one that does"
    )


def _check_experts(config: Config) -> None:
    """What an objective chooses from can be tried: on the same rows, and scored."""
    experts, adapt, where = config.experts, config.adapt, config.adapt_key
    if not experts:
        return
    loss, kind = config.loss_settings, config.objective_settings.kind
    for number, (own, _) in enumerate(experts):
        at = f"{where}.objective.experts[{number}].loss"
        _check_teaches(own, at)
        for key in ("rows", "refused_weight"):
            found, wanted = getattr(own, key), getattr(loss, key)
            if found != wanted:
                raise ConfigError(
                    f"{at}.{key}: all experts are tried on the same rows, got {found!r}; "
                    f"use {wanted!r} as {where}.loss does"
                )
    if not isinstance(adapt.guard, ShadowSettings):
        raise ConfigError(
            f"{where}.guard.kind: {where}.objective.kind = {kind} scores its experts on held-out "
            f"rows, which only shadow has, got finite; use shadow"
        )
    if adapt.trainer.background:
        raise ConfigError(
            f"{where}.trainer.background: {where}.objective.kind = {kind} tries its experts while "
            f"the engine waits, got true; use false"
        )
    if config.num_adapters:
        raise ConfigError(
            f"{where}.scope.state: {where}.objective.kind = {kind} needs one draft for all, got "
            f"{adapt.scope.state}; use shared"
        )


def _check_guard(config: Config) -> None:
    """A guard has the scores that a policy needs, and leaves rows to train on."""
    guard, where, kind = config.adapt.guard, config.adapt_key, config.policy_settings.kind
    if not isinstance(guard, ShadowSettings) and POLICIES.get(kind).needs_scores:
        raise ConfigError(
            f"{where}.guard.kind: {where}.policy.kind = {kind} goes by scores, which only shadow "
            f"has, got finite; use shadow, or a policy that needs none, as every_n_rounds"
        )
    window, drafted = config.adapt.replay.window, config.drafter_settings.num_draft_tokens
    most = max(0, window - 2 * drafted)
    if isinstance(guard, ShadowSettings) and guard.anchors > most:
        raise ConfigError(
            f"{where}.guard.anchors: {guard.anchors} held-out anchors leave nothing to train on of "
            f"{where}.replay.window = {window} rows; use at most {most}"
        )


def _check_adapters(scope: ScopeSettings, where: str) -> None:
    """What only adapters have is not set where there are none."""
    if scope.kind == LORA:
        return
    usual = type(scope)()
    for key in OF_ADAPTERS:
        if (came := getattr(scope, key)) != getattr(usual, key):
            raise ConfigError(
                f"{where}.{key}: only adapters have one, got {came!r} with kind: {scope.kind}; "
                f"use kind: lora, or leave it out"
            )


def _check_scope(config: Config) -> None:
    """Whose drafts are to be remembered, and can be."""
    scope, engine, where = config.adapt.scope, config.engine, f"{config.adapt_key}.scope"
    _check_adapters(scope, where)
    if scope.state == "per_request" and engine.max_batch != 1 and scope.kind != LORA:
        raise ConfigError(
            f"{where}.state: per_request keeps one draft for each request, so "
            f"engine.max_batch must be 1, got {engine.max_batch}; use state: shared, or kind: lora"
        )
    if scope.state == "per_tenant" and scope.kind != LORA:
        raise ConfigError(
            f"{where}.state: per_tenant needs adapters, kind: lora, got {scope.kind!r}"
        )
    if (scope.state == "per_tenant") != bool(scope.tenants):
        raise ConfigError(
            f"{where}.tenants: the tenants of state: per_tenant, got {list(scope.tenants)} with "
            f"state: {scope.state}"
        )
    if len(set(scope.tenants)) != len(scope.tenants):
        raise ConfigError(f"{where}.tenants: the same tenant twice in {list(scope.tenants)}")
