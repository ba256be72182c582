"""YAML files and dotted overrides, merged: what comes before anything has a type."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigTypeError,
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
)

from cosched.errors import ConfigError, PluginError
from cosched.guard.settings import FiniteSettings, ShadowSettings
from cosched.records import LORA, OF_ADAPTERS
from cosched.registry import (
    DRAFTERS,
    LENGTHS,
    LOSSES,
    OBJECTIVES,
    POLICIES,
    Registry,
    defaults_for,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

# Sections that a plugin types, and the kind where neither file nor defaults of the drafter name one.
PLUGIN_SECTIONS: dict[str, tuple[Registry, str | None]] = {
    "drafter": (DRAFTERS, None),
    "drafter.length": (LENGTHS, "fixed"),
    "adapt.policy": (POLICIES, "every_n_rounds"),
    "adapt.loss": (LOSSES, "forward_kl"),
    "adapt.objective": (OBJECTIVES, "fixed"),
}
GUARDS: dict[str, type[msgspec.Struct]] = {"finite": FiniteSettings, "shadow": ShadowSettings}


def read_yaml(path: Path) -> DictConfig:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        with explained(str(path)):
            given = OmegaConf.load(path)
    except AssertionError as error:  # OmegaConf's, of a text that is itself no mapping
        raise ConfigError(f"{path}: expected sections, as in `run: {{name: …}}`") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: byte {error.start} of it is not UTF-8") from error
    except Exception as error:
        if _is_of_yaml(error):
            raise ConfigError(f"{path} is not YAML: {error}") from error
        raise
    if not isinstance(given, DictConfig) or not given:
        found = "nothing is in it" if not given else "there are none"
        raise ConfigError(f"{path}: expected sections, as in `run: {{name: …}}`; {found}")
    return given


def _is_of_yaml(error: Exception) -> bool:
    """PyYAML's errors share no base with OmegaConf's."""
    return type(error).__module__.startswith("yaml")


def from_words(words: Sequence[str]) -> DictConfig:
    """``["key.sub=value", …]`` as the command line gives them.

    Raises:
        ConfigError: a word has another form.
    """
    malformed = [word for word in words if "=" not in word]
    if malformed:
        raise ConfigError(f"an override has the form key.sub=value; got {malformed[0]!r}")
    try:
        with explained("override"):
            return OmegaConf.from_dotlist(list(words))
    except Exception as error:
        if _is_of_yaml(error):
            raise ConfigError(f"override: a value is not YAML: {error}") from error
        raise


def from_keys(changes: Mapping[str, Any], where: str) -> DictConfig:
    """``{"key.sub": value, …}`` as a file gives them.

    Raises:
        ConfigError: a key leads through another key's value.
    """
    built = OmegaConf.create()
    with explained(where):
        for key, value in changes.items():
            OmegaConf.update(built, key, value, force_add=True)
    return built


def merge(given: DictConfig, changes: DictConfig, where: str) -> DictConfig:
    """``given`` with ``changes`` over it; neither is touched.

    A change of a section's ``kind`` leaves behind the fields that only the old kind has, or where
    none was named, that only others have.

    Raises:
        ConfigError: they do not fit, named by ``where`` they come from.
    """
    given = given.copy()
    _check_sections(_unresolved(given), _unresolved(changes), where)
    with explained(where):
        for section, kinds in _sections().items():
            for old, new in _places(section, given, changes):
                _forget_other_kind(old, new, kinds)
        for old, new in _places("adapt.scope", given, changes):
            if OmegaConf.is_dict(old) and OmegaConf.is_dict(new) and new.get("kind", LORA) != LORA:
                for key in OF_ADAPTERS:
                    old.pop(key, None)
        merged = OmegaConf.merge(given, changes)
    assert isinstance(merged, DictConfig)
    return merged


def _unresolved(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _check_sections(old: Any, new: Any, where: str, at: str = "") -> None:
    """Refuse a list where the other has a section: the two cannot be merged."""
    for key in old.keys() & new.keys():
        both = old[key], new[key]
        if all(isinstance(one, dict) for one in both):
            _check_sections(*both, where, f"{at}{key}.")
        elif any(isinstance(one, dict) for one in both) and any(
            isinstance(one, list) for one in both
        ):
            came = next(one for one in both if isinstance(one, list))
            whose = f"{where}: " if came is new[key] else ""
            raise ConfigError(
                f"{whose}{at}{key}: expected a section, {{key: value, …}}, got {came!r}"
            )


def plain(config: DictConfig, where: str) -> dict[str, Any]:
    """All references resolved, as plain data.

    Raises:
        ConfigError: one leads nowhere, or a value is missing.
    """
    with explained(where):
        raw = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}


def over(adapt: Any, partial: Any, where: str) -> Any:
    """The section ``adapt`` with a part of one over it, as plain data; ``where`` the part stands.

    Raises:
        ConfigError: it is no section, or does not fit.
    """
    if not isinstance(partial, dict):
        raise ConfigError(f"{where}: expected a part of the section adapt, got {partial!r}")
    if not isinstance(adapt, dict):
        return adapt  # named when the section is checked
    changes = OmegaConf.create({"adapt": partial})
    return plain(merge(OmegaConf.create({"adapt": adapt}), changes, where), where)["adapt"]


def with_defaults(drafter: Any, adapt: Any) -> Any:
    """``adapt`` with what the file does not say of it, which goes by the drafter.

    A section whose fields go with its kind is taken as it is where it names one.

    Raises:
        ConfigError: the drafter does not say how it drafts.
    """
    if not isinstance(drafter, dict) or not isinstance(adapt, dict):
        return adapt  # named when the section is checked
    try:
        defaults = defaults_for(
            drafter["kind"], [part["kind"] for part in drafter.get("drafters", ())]
        )
    except PluginError as error:
        raise ConfigError(f"drafter.kind: {error}") from error
    whole, sections = dict(adapt), _sections()
    for section, values in defaults.items():
        own = adapt.get(section, {})
        if isinstance(own, dict) and not (f"adapt.{section}" in sections and "kind" in own):
            whole[section] = {**values, **own}
    return whole


@contextmanager
def explained(where: str) -> Generator[None]:
    """Turn what OmegaConf or the file system says into one line that names the file."""
    try:
        yield
    except UnicodeDecodeError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{where}: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    """What is wrong with a value, and at which key."""
    said = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    at = f"{key}: " if key else ""
    if isinstance(error, GrammarParseError):
        return f"{at}a reference is written ${{section.key}}, and this one is not whole: {said}"
    if isinstance(error, InterpolationKeyError):
        name = said.removeprefix("Interpolation key ").removesuffix(" not found")
        return f"{at}it refers to {name}, and there is no such key"
    if missing := re.search(r"Environment variable '(.+?)' not found", said):
        name = missing[1]
        return (
            f"{at}the environment variable {name} is not set; set it, or give what to take "
            f"instead: ${{oc.env:{name},VALUE}}"
        )
    return f"{at}{said}"


def _places(section: str, given: DictConfig, changes: DictConfig) -> Iterator[tuple[Any, Any]]:
    """What both say where a section stands: one of ``adapt`` also in each variant and each draft."""
    places = [section]
    drafts = _names(given, "drafts")
    if section.startswith("drafter"):
        places += [section.replace("drafter", f"drafts.{name}", 1) for name in drafts]
    elif section.startswith("adapt."):
        for at in ("", *(f"drafts.{name}." for name in drafts)):
            places += [f"{at}{section}"] if at else []
            variants = _names(given, f"{at}variants")
            places += [section.replace("adapt", f"{at}variants.{name}", 1) for name in variants]
    for place in places:
        yield _select(given, place), _select(changes, place)


def _select(config: DictConfig, key: str) -> Any:
    """What stands there; None where nothing does, or a list is on the way, named when it is checked."""
    try:
        return OmegaConf.select(config, key)
    except ConfigTypeError:
        return None


def _names(given: DictConfig, key: str) -> list[Any]:
    found = _select(given, key)
    return list(found) if isinstance(found, DictConfig) else []


def _sections() -> dict[str, Mapping[str, type[msgspec.Struct]]]:
    """Sections whose fields depend on their kind, and the fields of each."""
    found: dict[str, Mapping[str, type[msgspec.Struct]]] = {
        section: {one.name: one.cls.Settings for one in registry.plugins()}
        for section, (registry, _) in PLUGIN_SECTIONS.items()
    }
    return found | {"adapt.guard": GUARDS}


def _forget_other_kind(old: Any, new: Any, of_kind: Mapping[str, type[msgspec.Struct]]) -> None:
    if not OmegaConf.is_dict(old) or not OmegaConf.is_dict(new) or "kind" not in new:
        return
    named = [old["kind"]] if "kind" in old else list(of_kind)
    if not all(isinstance(kind, str) and kind in of_kind for kind in (*named, new["kind"])):
        return  # what is no kind is named when the section is checked
    fields = {kind: {f.name for f in msgspec.structs.fields(of_kind[kind])} for kind in of_kind}
    for name in set().union(*(fields[kind] for kind in named)) - fields[new["kind"]]:
        old.pop(name, None)
