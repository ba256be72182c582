"""One YAML file, typed: OmegaConf merges files and overrides, msgspec refuses what is not allowed.

Sections whose fields depend on their ``kind`` (drafter, policy, loss) are checked against the
``Settings`` of the plugin of that name, so a stranger's plugin is validated like ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import OmegaConf

from cosched.errors import ConfigError
from cosched.registry import DRAFTERS
from cosched.settings.arms import ADAPTED, BASE_ARMS, DRAFT_MARK, VARIANT_NAME
from cosched.settings.check import check_together
from cosched.settings.convert import convert
from cosched.settings.device import check_there
from cosched.settings.drafts import require_draft, stand_in, take_drafts, whole_draft
from cosched.settings.hub import model_folder, not_found
from cosched.settings.merge import from_words, merge, over, plain, read_yaml, with_defaults
from cosched.settings.plugin_settings import plugin_settings
from cosched.settings.schema import Config
from cosched.settings.sections import AdaptSettings, Draft
from cosched.settings.weights import check_weights
from cosched.telemetry.trackers.opening import check_installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, and check all of it.

    Raises:
        ConfigError: the file cannot be read, or a setting is not allowed; the message names the
            key, what came and what is allowed.
    """
    return typed(merge(read_yaml(path), from_words(overrides), str(path)), str(path))


def typed(merged: DictConfig, where: str) -> Config:
    """Check a merged configuration; ``where`` it comes from is named with what cannot be resolved.

    Raises:
        ConfigError: a setting is not allowed.
    """
    raw = plain(merged, where)
    partial, drafts = raw.pop("variants", {}), take_drafts(raw)
    if not isinstance(partial, dict):
        raise ConfigError(f"variants: expected {{NAME: {{part of adapt}}}}, got {partial!r}")
    require_draft(raw, drafts)
    if isinstance(raw.get("drafter"), dict):
        plugin_settings("drafter", "drafter", raw["drafter"])  # the defaults go by it
    written = raw.get("adapt", {})
    whole = {name: whole_draft(name, drafts[name], written, partial) for name in drafts}
    raw["adapt"] = with_defaults(stand_in(raw, whole), written)
    config = msgspec.structs.replace(
        convert(raw, Config, ""),
        variants={
            str(name): _variant(str(name), over(raw["adapt"], one, f"variants.{name}"), "")
            for name, one in partial.items()
        },
        drafts={name: _draft(name, *one) for name, one in whole.items()},
    )
    check_together(config)
    return config


def _draft(
    name: str, drafter: dict[str, Any], adapt: dict[str, Any], variants: dict[str, Any]
) -> Draft:
    where = f"drafts.{name}."
    return Draft(
        drafter=drafter,
        adapt=_learning(adapt, f"{where}adapt"),
        variants={variant: _variant(variant, one, where) for variant, one in variants.items()},
    )


def _variant(name: str, adapt: dict[str, Any], where: str) -> AdaptSettings:
    """A variant's section, whole; ``where`` its name stands in the file."""
    if name in BASE_ARMS or not VARIANT_NAME.fullmatch(name):
        raise ConfigError(
            f"{where}variants: {name!r} cannot name an arm; take letters, digits, - and _, and none "
            f"of {', '.join(BASE_ARMS)}"
        )
    return _learning(adapt, f"{where}variants.{name}")


def _learning(adapt: dict[str, Any], where: str) -> AdaptSettings:
    settings = convert(adapt, AdaptSettings, where)
    for part in ("policy", "loss", "objective"):
        plugin_settings(f"adapt.{part}", f"{where}.{part}", getattr(settings, part))
    return settings


def check_paths(config: Config) -> None:
    """Every folder, file, device and package that the configuration names exists, and weights are whole.

    Raises:
        ConfigError: one is missing; the message names its key.
        CheckpointError: weights are missing, damaged, or of a kind that is not opened.
    """
    workload, engine = config.workload, config.engine
    if model_folder(config.target.path) is None:
        raise ConfigError(f"target.path: {not_found(config.target.path)}")
    named = {f"{key}.path": one.path for key, one in config.all_drafters.items()}
    if engine.kind == "trace":
        named["engine.trace"] = engine.trace or ""
    else:
        named |= workload.files
    for key, path in named.items():
        if not Path(path).exists():
            raise ConfigError(f"{key}: nothing at {path}")
    check_installed(config.run.trackers)
    check_there(engine.device)
    _check_weights(config)


def _check_weights(config: Config) -> None:
    """SGLang dies of a damaged file in a process of its own, after half a minute and without a reason."""
    served = config.engine.kind == "sglang"
    if Path(config.target.folder).is_dir():
        check_weights("target.path", Path(config.target.folder), pickles=not served)
    for key, settings in config.all_drafters.items():
        if DRAFTERS.get(settings.kind).formats is not None:  # others have files of their own kind
            check_weights(f"{key}.path", Path(settings.path), pickles=not served)


def to_yaml(config: Config) -> str:
    """The whole configuration, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.create(resolved(config)))


def outline(config: Config) -> str:
    """The whole configuration, of each variant and draft only what differs from ``adapt``."""
    raw = resolved(config)
    variants = raw["variants"]
    raw["variants"] = {name: _differing(own, raw["adapt"]) for name, own in variants.items()}
    for draft in raw.get("drafts", {}).values():
        own = draft["adapt"]
        draft["adapt"] = _differing(own, raw["adapt"])
        draft["variants"] = {
            name: _differing(section, own)
            for name, section in draft["variants"].items()
            if section != variants.get(name)
        }
        for part in ("adapt", "variants"):
            if not draft[part]:
                del draft[part]
    return OmegaConf.to_yaml(OmegaConf.create(raw))


def _differing(section: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What of it is not the base's: whole where the kind is another."""
    if section.get("kind") != base.get("kind"):
        return section
    found: dict[str, Any] = {}
    for key, value in section.items():
        if value != base.get(key):
            both = isinstance(value, dict) and isinstance(base.get(key), dict)
            found[key] = _differing(value, base[key]) if both else value
    return found


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration as plain data, the plugins' defaults included."""
    raw = msgspec.to_builtins(config)
    drafts = raw.pop("drafts")
    if raw["drafter"] is None:
        del raw["drafter"]
    else:
        raw["drafter"] = msgspec.to_builtins(config.drafter_settings)
    learning = [(raw["adapt"], config)]
    learning += [(raw["variants"][name], config.for_arm(name)) for name in config.variants]
    for name, section in drafts.items():
        arm, variants = f"{name}{DRAFT_MARK}", section["variants"]
        own = config.for_arm(arm + ADAPTED)
        learning += [(section["adapt"], own)]
        learning += [(variants[base], config.for_arm(arm + base)) for base in variants]
        raw.setdefault("drafts", {})[name] = {
            **msgspec.to_builtins(own.drafter_settings),
            "adapt": section["adapt"],
            "variants": variants,
        }
    for section, one in learning:
        section["policy"] = msgspec.to_builtins(one.policy_settings)
        section["loss"] = msgspec.to_builtins(one.loss_settings)
        section["objective"] = msgspec.to_builtins(one.objective_settings)
        for expert, (loss, rate) in zip(
            section["objective"].get("experts", ()), one.experts, strict=True
        ):
            expert.update(loss=msgspec.to_builtins(loss), lr=rate)
    return raw
