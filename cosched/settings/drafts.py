"""The section ``drafts``, merged, before what is learnt has a type.

That is, what stands in the places of ``drafter``, ``adapt`` and ``variants`` for a draft's arms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cosched.errors import ConfigError
from cosched.settings.arms import BASE_ARMS, DRAFT_MARK, PLAIN, VARIANT_NAME, draft_of
from cosched.settings.merge import over, with_defaults
from cosched.settings.plugin_settings import plugin_settings

Plain = dict[str, Any]


class WholeDraft(NamedTuple):
    """The three sections of one draft."""

    drafter: Plain
    adapt: Plain
    variants: dict[str, Plain]


def take_drafts(raw: Plain) -> dict[str, Plain]:
    """The section ``drafts`` out of a whole file.

    Raises:
        ConfigError: it is no mapping, a draft's name cannot begin an arm's, or a draft is none.
    """
    given = raw.pop("drafts", {})
    if not isinstance(given, dict):
        raise ConfigError(f"drafts: expected {{NAME: {{kind: …, path: …}}}}, got {given!r}")
    for name, section in given.items():
        if name in BASE_ARMS or not VARIANT_NAME.fullmatch(str(name)):
            raise ConfigError(
                f"drafts: {name!r} cannot name a draft, whose arms are NAME{DRAFT_MARK}frozen and so "
                f"on; take letters, digits, - and _, and none of {', '.join(BASE_ARMS)}"
            )
        if not isinstance(section, dict):
            raise ConfigError(f"drafts.{name}: expected a section like drafter, got {section!r}")
    return {str(name): section for name, section in given.items()}


def require_draft(raw: Plain, drafts: dict[str, Plain]) -> None:
    """Every arm that drafts has a draft.

    Raises:
        ConfigError: there is no section ``drafter``, and an arm is of none of ``drafts``.
    """
    if raw.get("drafter") is not None:
        return
    if not drafts:
        raise ConfigError("drafter: required, {kind: …, path: …}; or several, by name, in drafts")
    arms = raw.get("arms", BASE_ARMS)
    for arm in arms if isinstance(arms, list | tuple) else ():
        if isinstance(arm, str) and arm != PLAIN and draft_of(arm) is None:
            raise ConfigError(
                f"arms: {arm!r} names no draft, and there is no section drafter for such arms; use "
                f"{', '.join(f'{name}{DRAFT_MARK}{arm}' for name in drafts)}"
            )


def stand_in(raw: Plain, drafts: dict[str, WholeDraft]) -> Any:
    """By whose type the section ``adapt`` itself has its defaults: without ``drafter``, the first's."""
    return raw["drafter"] if raw.get("drafter") is not None else next(iter(drafts.values())).drafter


def whole_draft(name: str, section: Plain, adapt: Any, variants: dict[str, Any]) -> WholeDraft:
    """One draft's sections, over ``adapt`` and ``variants`` as the file has them.

    What neither says of how it learns is the default of this draft's own type.

    Raises:
        ConfigError: a field of the draft is not allowed, something is no section, or they do not fit.
    """
    where = f"drafts.{name}"
    drafter = {key: value for key, value in section.items() if key not in {"adapt", "variants"}}
    try:
        plugin_settings("drafter", where, drafter)
    except ConfigError as error:
        more = ", adapt, variants" if "; allowed here: " in str(error) else ""
        raise ConfigError(f"{error}{more}") from error
    own = section.get("variants", {})
    if not isinstance(own, dict):
        raise ConfigError(f"{where}.variants: expected {{NAME: {{part of adapt}}}}, got {own!r}")
    whole = with_defaults(drafter, over(adapt, section.get("adapt", {}), f"{where}.adapt"))
    merged = {}
    for variant in map(str, {**variants, **own}):
        partial = over(whole, variants.get(variant, {}), f"variants.{variant}")
        merged[variant] = over(partial, own.get(variant, {}), f"{where}.variants.{variant}")
    return WholeDraft(drafter, whole, merged)
