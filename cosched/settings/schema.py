"""The whole file, typed, and what its sections come to for each arm."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta
from omegaconf import OmegaConf

from cosched.errors import ConfigError
from cosched.protocols import ComposedSettings, ExpertSettings
from cosched.settings.arms import draft_of, split_arm
from cosched.settings.merge import merge, plain
from cosched.settings.plugin_settings import part_settings, plugin_settings
from cosched.settings.sections import (
    AdaptSettings,
    Draft,
    EngineSettings,
    RecordSettings,
    RunSettings,
    Section,
    TargetSettings,
    WorkloadSettings,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from cosched.protocols import (
        DrafterSettings,
        LengthSettings,
        LossSettings,
        ObjectiveSettings,
        PolicySettings,
    )


class Config(Section, frozen=True):
    """The whole file.

    ``arms`` are the ways to decode that ``cosched run`` compares: ``plain``, ``frozen``, ``adapted``
    and each variant's name, all but the first also with ``+window`` behind it.

    ``variants`` are other ways to learn, each an arm by its name: what a variant does not say is as
    in ``adapt``. ``drafts`` are drafts by name, for arms ``NAME.frozen`` and so on beside those of
    ``drafter``, or without any: each a section like ``drafter``, which takes nothing over from it,
    and may have ``adapt`` and ``variants`` for what it does otherwise than these say. Here each is
    whole.
    """

    run: RunSettings
    target: TargetSettings
    drafter: dict[str, Any] | None = None
    workload: WorkloadSettings = WorkloadSettings()
    arms: Annotated[tuple[str, ...], Meta(min_length=1)] = ("plain", "frozen", "adapted")
    engine: EngineSettings = EngineSettings()
    adapt: AdaptSettings = AdaptSettings()
    record: RecordSettings = RecordSettings()
    variants: dict[str, AdaptSettings] = msgspec.field(default_factory=dict)
    drafts: dict[str, Draft] = msgspec.field(default_factory=dict)

    def for_arm(self, arm: str) -> Config:
        """This configuration as one arm sees it: ``drafter`` and ``adapt`` are the arm's own."""
        own = self.drafts.get(draft_of(arm) or self._stand_in, self)
        return msgspec.structs.replace(
            self,
            arms=(arm,),
            drafter=own.drafter,
            adapt=own.variants.get(split_arm(arm)[0], own.adapt),
            variants=own.variants,
        )

    @property
    def by_draft(self) -> dict[str, Config]:
        """This configuration for each draft in use, by the key of its section."""
        arms = map(self.for_arm, self.arms)
        return {own.drafter_key: own for own in arms} | {self.drafter_key: self}

    @property
    def adapt_key(self) -> str:
        """Where the file says what ``adapt`` holds: ``for_arm`` may have taken it from elsewhere."""
        base, draft = split_arm(self.arms[0])[0], self._draft
        own = f"variants.{base}" if self.adapt is self.variants.get(base) else "adapt"
        return own if draft is None else f"drafts.{draft}.{own}"

    @property
    def drafter_key(self) -> str:
        """Where the file says what ``drafter`` holds."""
        draft = self._stand_in or self._draft
        return f"drafts.{draft}" if draft else "drafter"

    @property
    def drafter_settings(self) -> DrafterSettings:
        raw = self.drafts[self._stand_in].drafter if self.drafter is None else self.drafter
        return plugin_settings("drafter", self.drafter_key, raw)

    @property
    def all_drafters(self) -> dict[str, DrafterSettings]:
        """Whatever drafts in some arm, those that others are made of as well, by the key of its section."""
        found: dict[str, DrafterSettings] = {}
        for key, own in self.by_draft.items():
            settings = found[key] = own.drafter_settings
            if isinstance(settings, ComposedSettings):
                found |= part_settings(settings, key)
        return found

    @property
    def length_settings(self) -> LengthSettings:
        where = f"{self.drafter_key}.length"
        return plugin_settings("drafter.length", where, self.drafter_settings.length)

    @property
    def _draft(self) -> str | None:
        """Whose sections ``for_arm`` has put here; None where they are the file's own."""
        whose = (name for name, one in self.drafts.items() if one.drafter is self.drafter)
        return next(whose, None)

    @property
    def _stand_in(self) -> str:
        """The draft that goes for ``drafter`` where there is none, the first in use; "" else."""
        if self.drafter is not None:
            return ""
        named = (name for name in map(draft_of, self.arms) if name in self.drafts)
        return next(named, next(iter(self.drafts)))

    @property
    def policy_settings(self) -> PolicySettings:
        return plugin_settings("adapt.policy", f"{self.adapt_key}.policy", self.adapt.policy)

    @property
    def loss_settings(self) -> LossSettings:
        return plugin_settings("adapt.loss", f"{self.adapt_key}.loss", self.adapt.loss)

    @property
    def objective_settings(self) -> ObjectiveSettings:
        where = f"{self.adapt_key}.objective"
        return plugin_settings("adapt.objective", where, self.adapt.objective)

    @property
    def experts(self) -> tuple[tuple[LossSettings, float], ...]:
        """Loss and learning rate of each that the objective chooses from; empty where it does not."""
        settings = self.objective_settings
        if not isinstance(settings, ExpertSettings):
            return ()
        found: list[tuple[LossSettings, float]] = []
        for number, expert in enumerate(settings.experts):
            where = f"{self.adapt_key}.objective.experts[{number}].loss"
            own = OmegaConf.create({"adapt": {"loss": expert.loss}})
            merged = merge(OmegaConf.create({"adapt": {"loss": self.adapt.loss}}), own, where)
            loss = plugin_settings("adapt.loss", where, plain(merged, where)["adapt"]["loss"])
            found.append((loss, expert.lr or self.adapt.trainer.lr))
        return tuple(found)

    @property
    def num_adapters(self) -> int | None:
        """How many adapters serve beside one another; None where the draft is one for all."""
        state, batch = self.adapt.scope.state, self.engine.max_batch
        if state == "per_tenant":
            return len(self.adapt.scope.tenants)
        return batch if state == "per_request" and batch > 1 else None

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run.name


@contextmanager
def own_keys(config: Config) -> Generator[None]:
    """What others call ``adapt`` and ``drafter`` is the arm's own section: by its key in the file."""
    try:
        yield
    except ConfigError as error:
        section, dot, rest = str(error).partition(".")
        key = {"adapt": config.adapt_key, "drafter": config.drafter_key}.get(section, section)
        if key == section:
            raise
        raise ConfigError(f"{key}{dot}{rest}") from error
