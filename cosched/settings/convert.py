"""Plain data as typed settings; where it is none, what came and what is allowed."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.inspect import (
    DictType,
    ListType,
    LiteralType,
    StructType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Step = str | int
"""A key, or the place in a list."""

AT = " - at `$"  # msgspec's, before the path
LARGEST = 2**31 - 1  # of what is counted; far more than any machine holds of it
LARGEST_BYTES = 2**50  # under a key that ends in bytes


def convert(raw: Any, kind: Any, where: str) -> Any:
    """Plain data as ``kind``; ``where`` it stands in the file.

    Raises:
        ConfigError: it is not, or has a number without end or beyond all bounds; the message names
            the key, what came and what is allowed.
    """
    for steps, value in _leaves(raw):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{_shown(where, steps)}: a finite number is allowed, got {value!r}")
        most = LARGEST_BYTES if str(steps[-1] if steps else "").endswith("bytes") else LARGEST
        if isinstance(value, int) and abs(value) > most and "arguments" not in steps:
            raise ConfigError(
                f"{_shown(where, steps)}: an integer of at most {most} is allowed, got {value}"
            )
    try:
        return msgspec.convert(raw, kind)
    except UnicodeEncodeError as error:  # as JSON can escape it
        raise ConfigError(f"{where or 'configuration'}: half a character: {error}") from error
    except msgspec.ValidationError as error:
        steps, message = _steps(raw, kind, str(error)), str(error).partition(AT)[0]
        came, key = _lookup(raw, steps), _shown(where, steps)
        names_it = message.startswith("Invalid value")
        got = "" if came is None or names_it or isinstance(came, dict | list) else f", got {came!r}"
        raise ConfigError(f"{key}: {message}{got}{_allowed(message, kind, steps, raw)}") from error


def _leaves(raw: Any, steps: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """What is in mappings and lists, at whatever depth, and where."""
    if isinstance(raw, dict | list):
        for step, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield from _leaves(value, (*steps, step))
    else:
        yield steps, raw


def _shown(where: str, steps: Sequence[Step]) -> str:
    """A key as it is written in a file."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return f"{where}{path}".lstrip(".") or "configuration"


def _steps(raw: Any, kind: Any, error: str) -> list[Step]:
    """``.a.b[0]`` step by step; of a mapping's values, ``[...]``, the first that is refused."""
    steps: list[Step] = []
    path = error.partition(AT)[2].removesuffix("`")
    for step in re.findall(r"\[[^\]]*\]|[^.\[]+", path):
        if step == "[...]":
            name, raw = _refused(raw, kind, steps, error)
            steps.append(name)
        else:
            steps.append(int(step[1:-1]) if step.startswith("[") else step)
    return steps


def _refused(raw: Any, kind: Any, steps: Sequence[Step], said: str) -> tuple[str, Any]:
    """Which value of the mapping at ``steps`` is not allowed, and all with none but it there.

    By itself it is refused too, in the same words: others are for what stands behind it.
    """
    mapping = _lookup(raw, steps)
    for name, value in mapping.items():
        alone = _with(raw, steps, {name: value})
        try:
            msgspec.convert(alone, kind)
        except msgspec.ValidationError as error:
            if str(error) == said:
                return str(name), alone
    raise AssertionError(f"no value of {mapping} is refused")


def _with(raw: Any, steps: Sequence[Step], value: Any) -> Any:
    """A copy with another value there."""
    if not steps:
        return value
    copy = raw.copy()
    copy[steps[0]] = _with(raw[steps[0]], steps[1:], value)
    return copy


def _lookup(raw: Any, steps: Sequence[Step]) -> Any:
    """What stands there; None where nothing does."""
    for step in steps:
        if isinstance(step, str) and not (isinstance(raw, dict) and step in raw):
            return None
        raw = raw[step]
    return raw


def _allowed(message: str, kind: Any, steps: Sequence[Step], raw: Any) -> str:
    """Fields, values or kinds, whichever the message is about; it says the rest itself."""
    no_such_kind = message.startswith("Invalid value")
    found = [type_info(kind)]
    for step in steps[:-1] if no_such_kind else steps:  # a kind is no field
        found = [inner for one in found for inner in _inner(one, step, raw)]
        raw = _lookup(raw, [step])
    alternatives = [one for each in found for one in _alternatives(each)]
    structs = [one for one in alternatives if isinstance(one, StructType)]
    if no_such_kind:
        return _listed("here", [one.tag for one in structs])
    if "unknown field" in message:
        one = next(one for one in structs if _is_meant(one, raw))
        here = f"with kind {one.tag}" if one.tag else "here"
        return _replaced(one, message) + _listed(here, [field.name for field in one.fields])
    if message.startswith("Invalid enum value"):
        literals = [one for one in alternatives if isinstance(one, LiteralType)]
        return _listed("here", [value for one in literals for value in one.values])
    return ""


def _replaced(struct: StructType, message: str) -> str:
    """What to use in the place of a key that there was once: ``replaced`` of its section says it."""
    replaced: Mapping[str, str] = getattr(struct.cls, "replaced", {})
    found = [new for old, new in replaced.items() if f"`{old}`" in message]
    return "".join(f"; use {new} instead" for new in found)


def _listed(where: str, names: Sequence[Any]) -> str:
    return f"; allowed {where}: {', '.join(map(str, names)) or 'nothing else'}"


def _inner(found: Type, step: Step, raw: Any) -> list[Type]:
    """The types of what stands there in something of that type."""
    inner: list[Type] = []
    for one in _alternatives(found):
        if isinstance(one, StructType) and _is_meant(one, raw):
            inner += [field.type for field in one.fields if field.name == step]
        elif isinstance(one, DictType) and isinstance(step, str):
            inner.append(one.value_type)
        elif isinstance(one, ListType | VarTupleType) and isinstance(step, int):
            inner.append(one.item_type)
    return inner


def _alternatives(found: Type) -> Sequence[Type]:
    return found.types if isinstance(found, UnionType) else [found]


def _is_meant(struct: StructType, raw: Any) -> bool:
    """Of several by their kind this one."""
    return struct.tag_field is None or raw.get(struct.tag_field) == struct.tag
