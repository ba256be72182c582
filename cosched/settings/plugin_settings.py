"""Sections whose fields depend on their ``kind``, typed by the plugin of that name."""

from __future__ import annotations

from typing import Any

import msgspec

from cosched.errors import ConfigError, PluginError
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
    return settings
