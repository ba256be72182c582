"""The configuration reference, written from the classes that check the file.

Nothing of it is kept: what a key is called, what it may be, its default and what its class's
docstring says of it are read when the site is built.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
from msgspec import NODEFAULT
from msgspec import inspect as types
from omegaconf import OmegaConf

from cosched.bench.suite import RunsSuite, ScriptSuite
from cosched.plan.settings import PlanSettings
from cosched.protocols import (
    ComposedSettings,
    DrafterSettings,
    LengthSettings,
    LossSettings,
    ObjectiveSettings,
    PolicySettings,
)
from cosched.registry import DRAFTERS, LENGTHS, LOSSES, OBJECTIVES, POLICIES, Registry
from cosched.settings.schema import Config
from cosched.settings.serving import is_served
from cosched.sweep.file import SweepFile
from schedulers.defaults import TABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Struct = type[msgspec.Struct]


class Role(NamedTuple):
    """A section that plugins type: where they are, and the keys that all of them have."""

    registry: Registry
    shared: Struct


ROLES = {
    "drafter": Role(DRAFTERS, DrafterSettings),
    "drafter.length": Role(LENGTHS, LengthSettings),
    "adapt.policy": Role(POLICIES, PolicySettings),
    "adapt.loss": Role(LOSSES, LossSettings),
    "adapt.objective": Role(OBJECTIVES, ObjectiveSettings),
}
OTHER_FILES = ("sweep", "suite", "script", "plan")  # that name an experiment
# LaTeX of the losses' and objectives' formulas, as text.
SYMBOLS = {
    r"\tfrac12": "½", r"\sum": "Σ", r"\log": "log ", r"\min": "min", r"\max": "max", r"\exp": "exp",
    r"\arg": "arg ", r"\ell": "ℓ", r"\alpha": "α", r"\beta": "β", r"\eta": "η", r"\gamma": "γ", r"\propto": "∝",
    r"\quad": "\u2003", r"\in": " in ", r"||": "‖",
}  # fmt: skip


def settings_page() -> str:
    """The whole reference, as Markdown."""
    return "\n".join((*_section(Config, "", _homes(Config)), *_defaults(), *_other_files()))


def keys(settings: Struct) -> list[str]:
    """The keys that a class of settings checks."""
    return [field.encode_name for field in _fields(settings)]


def docstrings(settings: Struct, above: Struct = msgspec.Struct) -> str:
    """What a class says of its keys, then what those say that it has keys of, up to ``above``."""
    line = settings.__mro__[: settings.__mro__.index(above)]
    with_keys = (cls for cls in line if getattr(cls, "__struct_fields__", ()))
    own = dict.fromkeys(inspect.cleandoc(cls.__doc__ or "") for cls in with_keys)
    if not own and settings is not above:
        own = {inspect.cleandoc(settings.__doc__ or ""): None}
    return "\n\n".join(own)


def settings_classes() -> Iterator[Struct]:
    """Every class whose keys a file may hold."""
    for root in (Config, SweepFile, RunsSuite, ScriptSuite, PlanSettings):
        yield from _below(root, set())
    for role in ROLES.values():
        for plugin in role.registry.plugins():
            yield from _below(plugin.cls.Settings, set())


def key_paths() -> set[str]:
    """Every key of a file with its whole path, those of plugins' sections included."""
    found: set[str] = set()
    for settings, home in _homes(Config).items():
        found |= {path for path, _ in _paths(settings, home)}
    for role, (registry, _) in ROLES.items():
        for plugin in registry.plugins():
            found |= {f"{role}.{key}" for key in keys(plugin.cls.Settings)}
    return found | {"adapt.guard.kind"}


def _below(settings: Struct, seen: set[Struct]) -> Iterator[Struct]:
    if settings in seen:
        return
    seen.add(settings)
    yield settings
    for field in _fields(settings):
        for child in _structs(field.type):
            yield from _below(child, seen)


def _fields(settings: Struct) -> tuple[types.Field, ...]:
    return cast("types.StructType", types.type_info(settings)).fields


def _structs(kind: types.Type) -> list[Struct]:
    """The classes inside a type."""
    match kind:
        case types.StructType(cls=cls):
            return [cls]
        case types.UnionType(types=several):
            return [cls for one in several for cls in _structs(one)]
        case types.VarTupleType(item_type=item) | types.ListType(item_type=item):
            return _structs(item)
        case types.DictType(value_type=value):
            return _structs(value)
        case _:
            return []


# --- sections --------------------------------------------------------------------------------


def _homes(root: Struct) -> dict[Struct, str]:
    """The path at which each class of settings is written; elsewhere it is linked."""
    homes = {root: ""}
    waiting = [root]
    for settings in waiting:
        for path, field in _paths(settings, homes[settings]):
            new = [cls for cls in _structs(field.type) if cls not in homes]
            homes |= dict.fromkeys(new, path)
            waiting += new
    return homes


def _paths(settings: Struct, path: str) -> Iterator[tuple[str, types.Field]]:
    """Each key of a class with its whole path; that of a mapping's values ends in NAME."""
    for field in _fields(settings):
        where = f"{path}.{field.encode_name}".lstrip(".")
        named = isinstance(field.type, types.DictType) and _structs(field.type)
        yield (f"{where}.NAME" if named else where), field


def _section(settings: Struct, path: str, homes: dict[Struct, str]) -> Iterator[str]:
    """A class of settings at ``path`` of the file, and the sections inside it."""
    yield from _heading(path or "The file", path or "the-file", 3 if "." in path else 2)
    yield from _prose(docstrings(settings))
    yield from _table(_fields(settings), path, homes)
    for where, field in _paths(settings, path):
        here = [cls for cls in _structs(field.type) if homes[cls] == where]
        if where in ROLES:
            yield from _role(where, ROLES[where])
        elif len(here) == 1:
            yield from _section(here[0], where, homes)
        elif here:
            yield from _union(where, here)


def _union(path: str, classes: Iterable[Struct]) -> Iterator[str]:
    """A section whose keys go by its ``kind``."""
    yield from _heading(path, path, 3)
    for cls in classes:
        tag = str(cls.__struct_config__.tag)
        yield from _heading(f"{path}: {tag}", f"{path}-{tag}", 4)
        yield from _prose(docstrings(cls))
        yield from _table(_fields(cls), path, {})


def _role(path: str, role: Role) -> Iterator[str]:
    """A section that plugins type: the keys of all, then of each what it adds."""
    yield from _heading(path, path, 2 if "." not in path else 3)
    yield from _prose(docstrings(role.shared))
    yield from _table(_fields(role.shared), path, {})
    shared = {field.encode_name: field for field in _fields(role.shared)}
    for plugin in role.registry.plugins():
        yield from _heading(f"{path}: {plugin.name}", f"{path}-{plugin.name}", 4)
        yield from _prose(inspect.cleandoc(plugin.cls.__doc__ or ""))
        own = [f for f in _fields(plugin.cls.Settings) if shared.get(f.encode_name) != f]
        if own:
            yield from _prose(docstrings(plugin.cls.Settings, role.shared))
            yield from _table(own, path, {})
        for field in own:
            for cls in _structs(field.type):
                where = f"{path}.{field.encode_name}"
                yield from _heading(f"{where}, each of them", where, 5)
                yield from _prose(docstrings(cls))
                yield from _table(_fields(cls), where, {})
    for key in shared:
        if (inside := f"{path}.{key}") in ROLES:
            yield from _role(inside, ROLES[inside])


def _defaults() -> Iterator[str]:
    """What ``adapt`` holds where the file does not say, by how the drafter drafts."""
    yield from _heading("Defaults by drafter type", "defaults", 2)
    yield (
        "What a file leaves out of `adapt` comes from `schedulers/defaults.py`, by the drafter's type; "
        "one that is made of others goes by the one of them that is trained:\n"
    )
    rows: dict[str, list[str]] = {}
    for draft_type, section in TABLE.items():
        named = [
            p.name
            for p in DRAFTERS.plugins()
            if p.cls.draft_type == draft_type and not issubclass(p.cls.Settings, ComposedSettings)
        ]
        title = f"`{draft_type}`" + (f" ({', '.join(named)})" if named else "")
        rows.setdefault(OmegaConf.to_yaml(OmegaConf.create({"adapt": section})), []).append(title)
    for text, titles in rows.items():
        yield f"{', '.join(titles)}:\n\n```yaml\n{text}```\n"


def _other_files() -> Iterator[str]:
    """Files that name an experiment; what is inside that is above."""
    homes: dict[Struct, str] = {}
    yield from _file("A sweep's file", "sweep", SweepFile, homes)
    yield from _file("A benchmark's file, kind: runs", "suite", RunsSuite, homes)
    yield from _file("A benchmark's file, kind: script", "script", ScriptSuite, homes)
    yield from _file("What cosched plan is asked", "plan", PlanSettings, homes)


def _file(title: str, what: str, settings: Struct, homes: dict[Struct, str]) -> Iterator[str]:
    """The keys of such a file, and the sections in it that have no home yet."""
    new = {
        cls: where
        for where, field in _paths(settings, what)
        for cls in _structs(field.type)
        if cls not in homes
    }
    homes |= new
    yield from _heading(title, what, 2)
    yield from _prose(docstrings(settings))
    yield from _table(_fields(settings), what, homes)
    for cls, where in new.items():
        yield from _heading(f"{where.removeprefix(f'{what}.')} (of a {what})", where, 3)
        yield from _prose(docstrings(cls))
        yield from _table(_fields(cls), what, {})


# --- Markdown --------------------------------------------------------------------------------


def anchor(path: str) -> str:
    """The id of a section's heading: ``adapt.policy`` is ``adapt-policy``."""
    return path.replace(".", "-")


def _heading(text: str, path: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} {text} {{ #{anchor(path)} }}\n"


def _prose(docstring: str) -> Iterator[str]:
    """A docstring as Markdown; its formulas, which are LaTeX, as text."""

    def formula(found: re.Match[str]) -> str:
        text = re.sub(r"([_^])\{(\w+)\}", r"\1\2", found[1])
        text = re.sub(r"([_^])\{([^}]*)\}", r"\1(\2)", text)
        for command, symbol in SYMBOLS.items():
            text = text.replace(command, symbol)
        return f"```text\n{re.sub(' +', ' ', text).replace('( ', '(').strip()}\n```"

    yield re.sub(r"^\.\. math:: (.*)$", formula, docstring, flags=re.MULTILINE) + "\n"


def _table(fields: Iterable[types.Field], path: str, homes: dict[Struct, str]) -> Iterator[str]:
    rows = [_row(field, path, homes) for field in fields]
    if rows:
        yield "| key | what it may be | default | serve |\n| --- | --- | --- | --- |"
        yield "\n".join(rows) + "\n"


def _row(field: types.Field, path: str, homes: dict[Struct, str]) -> str:
    where = f"{path}.{field.encode_name}".lstrip(".")
    allowed = _allowed(field.type, where, homes)
    served = "✓" if path not in OTHER_FILES and is_served(where) else ""
    return f"| `{field.encode_name}` | {allowed} | {_default(field, where)} | {served} |"


def _default(field: types.Field, where: str) -> str:
    if field.required:
        return "**required**"
    value: Any = field.default if field.default is not NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct) or (where in ROLES and not value):
        return "[see there](#" + anchor(where) + ")"
    text = msgspec.json.encode(value).decode().replace(",", ", ").replace(":", ": ")
    return f"`{text}`"


def _allowed(kind: types.Type, where: str, homes: dict[Struct, str]) -> str:
    """What a value may be, in words."""
    if where in ROLES:
        return f"[a section by its kind](#{anchor(where)})"
    match kind:
        case types.BoolType():
            return "`true` or `false`"
        case types.IntType() | types.FloatType():
            return ("whole number" if isinstance(kind, types.IntType) else "number") + _range(kind)
        case types.StrType(pattern=pattern):
            return "text" if pattern is None else f"text of the form `{pattern}`"
        case types.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in values)
        case types.NoneType():
            return "`null`"
        case types.AnyType():
            return "anything"
        case types.UnionType(types=several) if (
            sum(isinstance(one, types.StructType) for one in several) > 1
        ):
            return f"[a section by its kind](#{anchor(where)})"
        case types.UnionType(types=several):
            return " or ".join(_allowed(one, where, homes) for one in several)
        case types.VarTupleType(item_type=item) | types.ListType(item_type=item):
            least = ", not empty" if kind.min_length else ""
            return f"list of: {_allowed(item, where, homes)}{least}"
        case types.DictType(value_type=types.AnyType()):
            return "mapping"
        case types.DictType(value_type=value):
            least = ", not empty" if kind.min_length else ""
            return f"mapping, of each name: {_allowed(value, f'{where}.NAME', homes)}{least}"
        case types.StructType(cls=cls):
            return f"[a section](#{anchor(homes.get(cls) or where)})"
        case _:
            raise TypeError(f"{where}: no words yet for a setting of the type {kind}")


def _range(kind: types.IntType | types.FloatType) -> str:
    bounds = {"≥": kind.ge, ">": kind.gt, "≤": kind.le, "<": kind.lt}
    found = [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None]
    return f", {' and '.join(found)}" if found else ""
