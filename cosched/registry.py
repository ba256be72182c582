"""Names to classes: our plugin folders first, then the entry points of other packages.

This is the only file that names the plugin folders, and it does so as strings: the core never
imports a plugin.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from cosched.errors import PluginError
from cosched.protocols import Drafter, DraftLength, Loss, Objective, Policy
from cosched.records import DraftType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T", bound=type)


class Plugin(NamedTuple):
    """A registered class, the first line of its docstring, and where it came from."""

    name: str
    cls: Any
    summary: str
    origin: str


class Registry:
    """Classes of one role by name; each has all that ``contract``, the role, has.

    Built-in plugins are the modules of ``package``; others announce themselves in the entry-point
    group ``cosched.GROUP``, by default that of the package's name, with a module or class that
    registers on import.
    """

    def __init__(self, role: str, package: str, contract: type, group: str | None = None) -> None:
        self.role = role
        self.package = package
        self.contract = contract
        self.group = f"cosched.{group or package}"
        self._plugins: dict[str, Plugin] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator; returns the class unchanged.

        Raises:
            PluginError: another class has the name already, or this one lacks what its role has.
        """

        def add(cls: T) -> T:
            known = self._plugins.get(name)
            if known is not None and known.cls is not cls:
                raise PluginError(
                    f"{self.role} {name!r} is registered twice: by {known.origin} and by "
                    f"{_origin(cls)}; rename one of them"
                )
            if lacking := _lacking(cls, self.contract):
                raise PluginError(
                    f"{self.role} {name!r} ({_origin(cls)}) lacks {', '.join(lacking)}; a class that "
                    f"inherits from {_origin(self.contract)} has all that has a default"
                )
            summary = (cls.__doc__ or "").strip().partition("\n")[0]
            self._plugins[name] = Plugin(name, cls, summary, _origin(cls))
            return cls

        return add

    def get(self, name: str) -> Any:
        """The class of that name.

        Raises:
            PluginError: no such name (the message lists those there are), or a plugin is broken.
        """
        self._load()
        if name not in self._plugins:
            raise PluginError(
                f"unknown {self.role} {name!r}; there are: {', '.join(sorted(self._plugins))}"
            )
        return self._plugins[name].cls

    def plugins(self) -> list[Plugin]:
        """Everything registered, by name."""
        self._load()
        return [self._plugins[name] for name in sorted(self._plugins)]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        home = Path(__file__).resolve().parent.parent / self.package
        found = Path(package.__file__ or "").resolve().parent
        if found != home:
            raise PluginError(
                f"the folder {found} shadows cosched's own {self.package!r} package at {home}; "
                f"rename it, or run from another folder"
            )
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in importlib.metadata.entry_points(group=self.group):
            self._load_entry(entry)
        self._loaded = True

    def _load_entry(self, entry: importlib.metadata.EntryPoint) -> None:
        """Import a stranger's plugin; one that fails leaves nothing behind."""
        before = dict(self._plugins)
        try:
            entry.load()
        except Exception as error:
            self._plugins = before
            raise PluginError(
                f"the {self.role} plugin {entry.name!r} ({entry.value}) failed to import: "
                f"{type(error).__name__}: {error}"
            ) from error


def _lacking(cls: type, contract: type) -> list[str]:
    """Members of a role that a class has not, or has only as the role's abstract ones."""
    declared = inspect.get_annotations(contract)  # as strings
    own = {name for name, kind in declared.items() if kind.startswith("ClassVar")} | {
        *vars(contract)
    }
    abstract: frozenset[str] = vars(cls).get("__abstractmethods__", frozenset())
    return sorted(
        name
        for name in own
        if not name.startswith("_") and (name in abstract or not hasattr(cls, name))
    )


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


DRAFTERS = Registry("drafter", "drafters", Drafter)
LOSSES = Registry("loss", "losses", Loss)
POLICIES = Registry("policy", "schedulers", Policy)
OBJECTIVES = Registry("objective", "schedulers", Objective, "objectives")
LENGTHS = Registry("draft length", "schedulers", DraftLength, "lengths")


def defaults_for(drafter: str, parts: Sequence[str] = ()) -> dict[str, Any]:
    """What ``adapt`` holds for a drafter where the file does not say: a row of ``schedulers.defaults``.

    Of one that is made of ``parts`` it goes by the one that is trained, if one is.

    Raises:
        PluginError: no such drafter, or it drafts in no way that is known.
    """
    types = [_draft_type(name) for name in (drafter, *parts)]
    draft_type = next((one for one in types if one != "none"), "none")
    POLICIES.plugins()  # proves that the package is ours
    table = importlib.import_module(f"{POLICIES.package}.defaults").TABLE
    return copy.deepcopy(table[draft_type])


def _draft_type(drafter: str) -> DraftType:
    cls, known = DRAFTERS.get(drafter), get_args(DraftType)
    if cls.draft_type not in known:
        raise PluginError(
            f"the drafter {drafter!r} ({_origin(cls)}) has draft_type = {cls.draft_type!r}; one of "
            f"{', '.join(known)} is needed"
        )
    return cls.draft_type
