"""Plain data as typed settings; where it is none, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.inspect import LiteralType, Metadata, StructType, Type, UnionType, type_info

from cosched.errors import ConfigError


def convert(raw: Any, kind: Any, where: str) -> Any:
    """Plain data as ``kind``; ``where`` it stands in the file.

    Raises:
        ConfigError: it is not; the message names the key, what came and what is allowed.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, tail = str(error).partition(" - at `$")
        path = tail.strip("`").lstrip(".")
        key = ".".join(part for part in (where, path) if part)
        came = _lookup(raw, path)
        shown = "" if came is None or isinstance(came, dict | list) else f", got {came!r}"
        names = _allowed(message, kind, path, raw)
        allowed = f"; allowed here: {', '.join(map(str, names))}" if names else ""
        raise ConfigError(f"{key or 'configuration'}: {message}{shown}{allowed}") from error


def _lookup(raw: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        if not isinstance(raw, dict) or part not in raw:
            return None
        raw = raw[part]
    return raw


def _allowed(message: str, kind: Any, path: str, raw: Any) -> list[Any]:
    """Fields, literal values or kinds, whichever the message is about; it says the rest itself."""
    steps = [step for step in path.split(".") if step]
    no_such_kind = message.startswith("Invalid value")
    if no_such_kind:
        steps.pop()  # the kind is no field, it stands for one of several types
    found = type_info(kind)
    for step in steps:
        types = [
            field.type for one in _structs(found, raw) for field in one.fields if field.name == step
        ]
        if not types:
            return []
        found, raw = types[0], raw[step]
    if no_such_kind:
        return [one.tag for one in _alternatives(found) if isinstance(one, StructType)]
    if "unknown field" in message:
        return [field.name for one in _structs(found, raw) for field in one.fields]
    if message.startswith("Invalid enum value"):
        literals = [one for one in _alternatives(found) if isinstance(one, LiteralType)]
        return [value for one in literals for value in one.values]
    return []


def _alternatives(found: Type) -> list[Type]:
    if isinstance(found, Metadata):
        found = found.type
    return list(found.types) if isinstance(found, UnionType) else [found]


def _structs(found: Type, raw: Any) -> list[StructType]:
    """Of several by their kind the one that is meant."""
    structs = [one for one in _alternatives(found) if isinstance(one, StructType)]
    if len(structs) == 1:
        return structs
    return [one for one in structs if one.tag_field and raw.get(one.tag_field) == one.tag]
