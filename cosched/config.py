"""One YAML file, typed: OmegaConf merges files and overrides, msgspec refuses what is not allowed.

Sections whose fields depend on their ``kind`` (drafter, policy, loss) are checked against the
``Settings`` of the plugin of that name, so a stranger's plugin is validated like ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from omegaconf import OmegaConf

from cosched.arms import ADAPTED, BASE_ARMS, DRAFT_MARK, VARIANT_NAME, draft_of, split_arm
from cosched.consistency import check_together
from cosched.conversion import convert
from cosched.drafts import require_draft, stand_in, take_drafts, whole_draft
from cosched.errors import ConfigError
from cosched.hub import model_folder, not_found
from cosched.merging import from_words, merge, over, plain, read_yaml, with_defaults
from cosched.plugin_settings import plugin_settings
from cosched.protocols import ExpertSettings
from cosched.records import TeacherForm
from cosched.watch import FiniteSettings, ShadowSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from cosched.protocols import (
        DrafterSettings,
        LossSettings,
        ObjectiveSettings,
        PolicySettings,
    )

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^\w[\w.@-]*$")]  # what may be a folder's name
NotNegative = Annotated[float, Meta(ge=0)]
Files = str | Annotated[tuple[str, ...], Meta(min_length=1)] | None  # one, or several


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the file: unknown keys are refused, nothing changes after loading."""


class RunSettings(Section, frozen=True):
    """``run``: the folder ``name`` in ``dir`` gets the results; ``seed`` is that of all randomness."""

    name: str
    dir: str = "runs"
    seed: int = 0


class EngineSettings(Section, frozen=True):
    """``engine``: what decodes. ``trace`` is the folder that ``kind: trace`` replays.

    ``device`` is ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``; ``dtype`` is that of the
    weights of target and draft; ``max_batch`` requests are decoded at once; ``num_threads`` are CPU
    threads (null: what torch takes, and one where SGLang serves on a CPU).

    A trace has the target's rows; ``live`` computes them all the same, which takes the time that
    verification takes: to compare speeds on the same text.
    With ``kind: sglang``, ``arguments`` are SGLang's own, as ``sglang.Engine`` names them.

    ``pack`` lays out the weights of linear layers once for this CPU (``cosched.packing``); it means
    nothing on a GPU. A row's last digits depend on how many rows are computed with it, so that greedy
    text may part from plain decoding where two tokens are as good as one another. ``exact`` computes
    as many rows for the arm ``plain`` as a verification has, and lays weights out so that every row
    is computed alike: greedy texts are then equal to the bit, one request at a time (attention of
    several is not asked to be). It costs speed, of plain decoding most; where this processor cannot
    do it, it is refused.
    """

    kind: Literal["embedded", "trace", "sglang"] = "embedded"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: Positive = 1
    num_threads: Positive | None = None
    trace: str | None = None
    live: bool = False
    pack: bool = True
    exact: bool = False
    arguments: dict[str, Any] = {}


class TargetSettings(Section, frozen=True):
    """``target``: ``path`` is a folder in Hugging Face format, or a cached model, ``owner/model``."""

    path: str

    @property
    def folder(self) -> str:
        """Where it is; ``path`` itself where it is nowhere, which ``check_paths`` refuses."""
        return model_folder(self.path) or self.path


class WorkloadSettings(Section, frozen=True):
    """``workload``: ``prompts`` to answer, or ``documents`` whose text is forced.

    A prompts file has one JSON object a line (or one array of them): ``{"text": …}`` as it is, or
    chat, through the target's own template: OpenAI's ``{"messages": [{"role": …, "content": …}]}``
    or ShareGPT's ``{"conversations": [{"from": …, "value": …}]}``; optionally with ``id``, and
    ``tenant``, whose it is. An answer that ends a conversation is left out: it is no
    question. ``turns`` answers the last so many questions of each, one after the other: before the
    first is what the file has, between them the target's own answers. Each turn is a request, of
    the id ``ID@2`` and so on; where one does not fit any more its conversation ends, and is counted.
    A recording has every turn as a text of its own.
    ``samples`` answers each prompt that many times, one round over all prompts after the other.
    The first ``max_prompts`` lines are used (null: all).

    An answer has at most ``max_new_tokens`` and ends at the end-of-text token, unless
    ``stop_at_end_of_text`` is off. It is sampled at ``temperature`` (0: greedy) from the most likely
    tokens that together have the probability ``top_p``.

    ``prompts`` and ``documents`` may be lists of files. An id is then that of its file and of the
    line, ``chat:ID`` for ``chat.jsonl``, ``max_prompts`` counts the lines of each file, and figures
    are also told by file.

    With ``documents`` text is forced: real text at real cost, judged by the chance that the target
    would have accepted each draft. Of ``{"text": …}`` that is all after its first ``prompt_tokens``
    tokens; of a chat its last answer, behind the prompt that asks for it.
    """

    prompts: Files = None
    documents: Files = None
    samples: Positive = 1
    turns: Positive = 1
    prompt_tokens: Positive = 64
    max_new_tokens: Positive = 512
    max_prompts: Positive | None = None
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    stop_at_end_of_text: bool = True

    @property
    def files(self) -> dict[str, str]:
        """The files of what is to be said or answered, by their keys; none where it names none."""
        named = {"workload.documents": self.documents, "workload.prompts": self.prompts}
        found = {key: path for key, path in named.items() if isinstance(path, str)}
        for key, paths in named.items():
            if isinstance(paths, tuple):
                found |= {f"{key}[{place}]": path for place, path in enumerate(paths)}
        return found


class RecordSettings(Section, frozen=True):
    """``record``: how ``--record`` stores a trace, in ``dtype`` (float32: exact).

    A request that would take the folder above ``max_bytes`` is left out and counted.

    ``feature_layers`` are stored beside those that the drafter needs, so that other drafters can be
    judged on the same trace ("after that layer", 0-based).
    """

    feature_layers: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_bytes: Positive = 2147483648


class ReplaySettings(Section, frozen=True):
    """``adapt.replay``: rows kept of each request, and how many are trained on.

    ``window`` rows of context are kept of each request, at most ``max_tokens`` rows and ``max_bytes``
    of all; a micro-step trains on at most ``anchors`` of them. A draft learns to look as far back as ``window`` reaches: give it the length that it serves.
    ``keep_finished`` keeps a request's rows until others need the room: to train when idle.
    ``fresh`` trains on each anchor once at most, in the first update after it.
    ``teacher`` is the form in which the target's rows wait: ``hidden``, its last hidden state, from
    which its head gives the logits again; ``logits``, all of them; ``top_k``, the ``teacher_top_k``
    best of them and the mass of the rest, which is taken to be shared evenly. The last two know no
    more of a prompt than its last row.
    """

    window: Positive = 128
    anchors: Positive = 64
    max_tokens: Positive = 65536
    max_bytes: Positive = 268435456
    teacher: TeacherForm = "hidden"
    teacher_top_k: Positive = 64
    keep_finished: bool = False
    fresh: bool = False


class ScopeSettings(Section, frozen=True):
    """``adapt.scope``: which parameters learn, and for how long they remember.

    ``kind`` is ``full``, ``body`` (all but embedding and head), ``tail`` (only what committed keys and values
    do not depend on) or ``lora``. ``state`` says whose they are: ``shared`` by all requests,
    ``per_request`` (as loaded again when the request ends) or ``per_tenant``.
    With ``kind: lora`` adapters of ``rank`` learn, scaled by ``alpha / rank``, on the linear layers
    that ``targets`` name, by their whole names or the ends of them; null is all of them. State per
    request in batches, and per tenant, needs adapters: one for each running request, or one for each
    of ``tenants``, whose requests name them.
    """

    kind: str = "full"
    state: Literal["per_request", "shared", "per_tenant"] = "shared"
    rank: Positive = 8
    alpha: Annotated[float, Meta(gt=0)] = 16.0
    targets: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    tenants: tuple[Name, ...] = ()


class TrainerSettings(Section, frozen=True):
    """``adapt.trainer``: DeepSpeed ZeRO with AdamW on float32 masters.

    ``lr`` is AdamW's learning rate and ``weight_decay`` its decay; gradients are clipped to the norm
    ``max_grad_norm``.
    ``zero_stage`` 1 and 2 divide what the optimizer holds among the ranks that train together. Where
    there is one, 0 takes the same steps and spares it copies of all weights and gradients.
    ``background`` trains beside the decoding, in a thread (on a GPU on a stream of its own) and
    publishes when it is done; off, the engine waits for each update, and runs repeat exactly.
    ``precision`` is that of matrix products; ``auto`` is bfloat16 where the device multiplies it
    faster, so that results differ from one machine to another.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2] = 1
    lr: Annotated[float, Meta(gt=0)] = 3e-4
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    weight_decay: NotNegative = 0.0
    background: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "float32"


class PublishSettings(Section, frozen=True):
    """``adapt.publish``: every ``target_check_every``-th one checksums all of the target; 0: none.

    ``keep`` is how many versions can be served again, beside the draft as it was loaded.
    """

    target_check_every: Annotated[int, Meta(ge=0)] = 16
    keep: Positive = 1


class AdaptSettings(Section, frozen=True):
    """``adapt``: how the arm ``adapted`` learns, and what the variants begin from.

    ``policy``, ``loss``, ``objective`` and ``guard`` have the fields of their ``kind``. What a file
    leaves out, the kind of these or ``trainer.lr`` or ``replay.anchors``, is that of the drafter's
    type (``schedulers/defaults.py``).
    """

    policy: dict[str, Any] = msgspec.field(default_factory=dict)
    loss: dict[str, Any] = msgspec.field(default_factory=dict)
    objective: dict[str, Any] = msgspec.field(default_factory=dict)
    replay: ReplaySettings = ReplaySettings()
    scope: ScopeSettings = ScopeSettings()
    trainer: TrainerSettings = TrainerSettings()
    guard: FiniteSettings | ShadowSettings = ShadowSettings()
    publish: PublishSettings = PublishSettings()


class Draft(Section, frozen=True):
    """One of ``drafts``: what its arms have as ``drafter``, ``adapt`` and ``variants``, each whole."""

    drafter: dict[str, Any]
    adapt: AdaptSettings
    variants: dict[str, AdaptSettings]


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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, and check all of it.

    Raises:
        ConfigError: the file cannot be read, or a setting is not allowed; the message names the
            key, what came and what is allowed.
    """
    return typed(merge(read_yaml(path), from_words(overrides), str(path)), str(path))


def typed(merged: DictConfig, where: str) -> Config:
    """Check a merged configuration; ``where`` it comes from is named with what cannot be resolved.

    Raises:
        ConfigError: a setting is not allowed.
    """
    raw = plain(merged, where)
    partial, drafts = raw.pop("variants", {}), take_drafts(raw)
    if not isinstance(partial, dict):
        raise ConfigError(f"variants: expected {{NAME: {{part of adapt}}}}, got {partial!r}")
    require_draft(raw, drafts)
    if isinstance(raw.get("drafter"), dict):
        plugin_settings("drafter", "drafter", raw["drafter"])  # the defaults go by it
    written = raw.get("adapt", {})
    whole = {name: whole_draft(name, drafts[name], written, partial) for name in drafts}
    raw["adapt"] = with_defaults(stand_in(raw, whole), written)
    config = msgspec.structs.replace(
        convert(raw, Config, ""),
        variants={
            str(name): _variant(str(name), over(raw["adapt"], one, f"variants.{name}"), "")
            for name, one in partial.items()
        },
        drafts={name: _draft(name, *one) for name, one in whole.items()},
    )
    check_together(config)
    return config


def _draft(
    name: str, drafter: dict[str, Any], adapt: dict[str, Any], variants: dict[str, Any]
) -> Draft:
    where = f"drafts.{name}."
    return Draft(
        drafter=drafter,
        adapt=_learning(adapt, f"{where}adapt"),
        variants={variant: _variant(variant, one, where) for variant, one in variants.items()},
    )


def _variant(name: str, adapt: dict[str, Any], where: str) -> AdaptSettings:
    """A variant's section, whole; ``where`` its name stands in the file."""
    if name in BASE_ARMS or not VARIANT_NAME.fullmatch(name):
        raise ConfigError(
            f"{where}variants: {name!r} cannot name an arm; take letters, digits, - and _, and none "
            f"of {', '.join(BASE_ARMS)}"
        )
    return _learning(adapt, f"{where}variants.{name}")


def _learning(adapt: dict[str, Any], where: str) -> AdaptSettings:
    settings = convert(adapt, AdaptSettings, where)
    for part in ("policy", "loss", "objective"):
        plugin_settings(f"adapt.{part}", f"{where}.{part}", getattr(settings, part))
    return settings


def check_paths(config: Config) -> None:
    """Every folder and file that the configuration names exists.

    Raises:
        ConfigError: one is missing; the message names its key.
    """
    workload, engine = config.workload, config.engine
    if model_folder(config.target.path) is None:
        raise ConfigError(f"target.path: {not_found(config.target.path)}")
    named = {f"{key}.path": own.drafter_settings.path for key, own in config.by_draft.items()}
    if engine.kind == "trace":
        named["engine.trace"] = engine.trace or ""
    else:
        named |= workload.files
    for key, path in named.items():
        if not Path(path).exists():
            raise ConfigError(f"{key}: nothing at {path}")


def to_yaml(config: Config) -> str:
    """The whole configuration, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.create(resolved(config)))


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration as plain data, the plugins' defaults included."""
    raw = msgspec.to_builtins(config)
    drafts = raw.pop("drafts")
    if raw["drafter"] is None:
        del raw["drafter"]
    else:
        raw["drafter"] = msgspec.to_builtins(config.drafter_settings)
    learning = [(raw["adapt"], config)]
    learning += [(raw["variants"][name], config.for_arm(name)) for name in config.variants]
    for name, section in drafts.items():
        arm, variants = f"{name}{DRAFT_MARK}", section["variants"]
        own = config.for_arm(arm + ADAPTED)
        learning += [(section["adapt"], own)]
        learning += [(variants[base], config.for_arm(arm + base)) for base in variants]
        raw.setdefault("drafts", {})[name] = {
            **msgspec.to_builtins(own.drafter_settings),
            "adapt": section["adapt"],
            "variants": variants,
        }
    for section, one in learning:
        section["policy"] = msgspec.to_builtins(one.policy_settings)
        section["loss"] = msgspec.to_builtins(one.loss_settings)
        section["objective"] = msgspec.to_builtins(one.objective_settings)
        for expert, (loss, rate) in zip(
            section["objective"].get("experts", ()), one.experts, strict=True
        ):
            expert.update(loss=msgspec.to_builtins(loss), lr=rate)
    return raw
