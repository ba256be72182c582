"""Sections whose fields depend on their ``kind``, typed by the plugin of that name."""

from __future__ import annotations

from typing import Any

import msgspec

from cosched.errors import ConfigError, PluginError
from cosched.protocols import OF_THE_WHOLE, ComposedSettings, DrafterSettings
from cosched.settings.convert import convert
from cosched.settings.merge import PLUGIN_SECTIONS


def plugin_settings(section: str, where: str, raw: dict[str, Any]) -> Any:
    """What the plugin of a section has for settings; ``where`` the section stands in the file.

    A section in it that a plugin types, too, is whole.

    Raises:
        ConfigError: no plugin is named, there is none of that name, or a field is not allowed.
    """
    registry, default = PLUGIN_SECTIONS[section]
    kind = raw.get("kind", default)
    if not isinstance(kind, str):
        came = "none was given" if kind is None else f"got {kind!r}"
        there = ", ".join(plugin.name for plugin in registry.plugins())
        raise ConfigError(
            f"{where}.kind: the name of a {registry.role}, {came}; there are: {there}"
        )
    try:
        cls = registry.get(kind)
    except PluginError as error:
        raise ConfigError(f"{where}.kind: {error}") from error
    settings = convert({**raw, "kind": kind}, cls.Settings, where)
    for other in PLUGIN_SECTIONS:
        inside, _, key = other.rpartition(".")
        if inside == section:
            whole = plugin_settings(other, f"{where}.{key}", getattr(settings, key))
            settings = msgspec.structs.replace(settings, **{key: msgspec.to_builtins(whole)})
    if isinstance(settings, ComposedSettings):
        parts = [_without_the_whole(one) for one in part_settings(settings, where).values()]
        settings = msgspec.structs.replace(settings, drafters=tuple(parts))
    return settings


def part_settings(settings: ComposedSettings, where: str) -> dict[str, DrafterSettings]:
    """Of each drafter that another is made of, by the key of its section; ``where`` the other stands.

    Raises:
        ConfigError: one is not allowed, says what is said of the whole, or is made of others itself.
    """
    found: dict[str, DrafterSettings] = {}
    for number, section in enumerate(settings.drafters):
        key = f"{where}.drafters[{number}]"
        for name in OF_THE_WHOLE:
            if name in section:
                raise ConfigError(f"{key}.{name}: said of all of them; use {where}.{name}")
        part: DrafterSettings = plugin_settings("drafter", key, section)
        if isinstance(part, ComposedSettings):
            raise ConfigError(
                f"{key}.kind: {part.kind} is made of drafters, and cannot be one of others; name its "
                f"own in {where}.drafters"
            )
        found[key] = part
    return found


def _without_the_whole(part: DrafterSettings) -> dict[str, Any]:
    whole: dict[str, Any] = msgspec.to_builtins(part)
    return {key: value for key, value in whole.items() if key not in OF_THE_WHOLE}
