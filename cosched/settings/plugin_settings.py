"""Sections whose fields depend on their ``kind``, typed by the plugin of that name."""

from __future__ import annotations

from typing import Any

from cosched.errors import ConfigError, PluginError
from cosched.settings.convert import convert
from cosched.settings.merge import PLUGIN_SECTIONS


def plugin_settings(section: str, where: str, raw: dict[str, Any]) -> Any:
    """What the plugin of a section has for settings; ``where`` the section stands in the file.

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
    return convert({**raw, "kind": kind}, cls.Settings, where)
