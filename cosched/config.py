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
from omegaconf.errors import OmegaConfBaseException

from cosched.errors import ConfigError, PluginError
from cosched.records import TeacherForm
from cosched.registry import DRAFTERS, LOSSES, POLICIES, Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import DrafterSettings, LossSettings, PolicySettings

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
BASE_ARMS = ("plain", "frozen", "adapted")
WINDOW_SUFFIX = "+window"
# Sections that a plugin types, and the kind where the file names none.
PLUGIN_SECTIONS: dict[str, tuple[Registry, str | None]] = {
    "drafter": (DRAFTERS, None),
    "adapt.policy": (POLICIES, "every_n_rounds"),
    "adapt.loss": (LOSSES, "forward_kl"),
}


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the file: unknown keys are refused, nothing changes after loading."""


class RunSettings(Section, frozen=True):
    """``run``: where the results go (``dir/name``), and the seed of every random draw."""

    name: str
    dir: str = "runs"
    seed: int = 0


class EngineSettings(Section, frozen=True):
    """``engine``: what decodes. ``trace`` is the folder that ``kind: trace`` replays.

    With ``kind: sglang``, ``arguments`` are SGLang's own, as ``sglang.Engine`` names them.
    """

    kind: Literal["embedded", "trace", "sglang"] = "embedded"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: Positive = 1
    num_threads: Positive | None = None
    trace: str | None = None
    arguments: dict[str, Any] = {}


class TargetSettings(Section, frozen=True):
    """``target``: a folder in Hugging Face format."""

    path: str


class WorkloadSettings(Section, frozen=True):
    """``workload``: prompts to answer, or documents that the target is made to say.

    A prompts file has one JSON object a line with ``text`` (and optionally ``id``). With
    ``documents`` the same, and the text after the first ``prompt_tokens`` tokens is forced: real
    text at real cost, judged by the chance that the target would have accepted each draft.
    """

    prompts: str | None = None
    documents: str | None = None
    prompt_tokens: Positive = 64
    max_new_tokens: Positive = 512
    max_prompts: Positive | None = None
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    stop_at_end_of_text: bool = True


class RecordSettings(Section, frozen=True):
    """``record``: how ``--record`` stores a trace; float32 makes it exact.

    ``feature_layers`` are stored beside those that the drafter needs, so that other drafters can be
    judged on the same trace ("after that layer", 0-based).
    """

    feature_layers: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_bytes: Positive = 2147483648


class ReplaySettings(Section, frozen=True):
    """``adapt.replay``: rows of context kept per request, anchors per micro-step, hard limits.

    A draft learns to look as far back as ``window`` reaches: give it the length that it serves.
    ``keep_finished`` keeps a request's rows until others need the room: to train when idle.
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


class ScopeSettings(Section, frozen=True):
    """``adapt.scope``: which parameters learn, and for how long they remember."""

    kind: str = "full"
    state: Literal["per_request", "shared"] = "shared"


class TrainerSettings(Section, frozen=True):
    """``adapt.trainer``: DeepSpeed ZeRO with AdamW on float32 masters.

    ``background`` trains beside the decoding, in a thread (on a GPU on a stream of its own) and
    publishes when it is done; off, the engine waits for each update, and runs repeat exactly.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2] = 1
    lr: Annotated[float, Meta(gt=0)] = 3e-4
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    weight_decay: NotNegative = 0.0
    background: bool = False


class GuardSettings(Section, frozen=True):
    """``adapt.guard``: ``finite`` refuses updates none of whose steps was finite."""

    kind: Literal["finite"] = "finite"


class PublishSettings(Section, frozen=True):
    """``adapt.publish``: every n-th publication checksums all of the target; 0 is never.

    ``keep`` is how many versions can be served again, beside the draft as it was loaded.
    """

    target_check_every: Annotated[int, Meta(ge=0)] = 16
    keep: Positive = 1


class AdaptSettings(Section, frozen=True):
    """``adapt``: how the arm ``adapted`` learns.

    ``policy`` and ``loss`` have the fields of their ``kind``: ``every_n_rounds`` and
    ``forward_kl`` unless they say otherwise.
    """

    policy: dict[str, Any] = msgspec.field(default_factory=dict)
    loss: dict[str, Any] = msgspec.field(default_factory=dict)
    replay: ReplaySettings = ReplaySettings()
    scope: ScopeSettings = ScopeSettings()
    trainer: TrainerSettings = TrainerSettings()
    guard: GuardSettings = GuardSettings()
    publish: PublishSettings = PublishSettings()


class Config(Section, frozen=True):
    """The whole file."""

    run: RunSettings
    target: TargetSettings
    drafter: dict[str, Any]
    workload: WorkloadSettings = WorkloadSettings()
    arms: Annotated[tuple[str, ...], Meta(min_length=1)] = ("plain", "frozen", "adapted")
    engine: EngineSettings = EngineSettings()
    adapt: AdaptSettings = AdaptSettings()
    record: RecordSettings = RecordSettings()

    @property
    def drafter_settings(self) -> DrafterSettings:
        return _plugin_settings("drafter", self.drafter)

    @property
    def policy_settings(self) -> PolicySettings:
        return _plugin_settings("adapt.policy", self.adapt.policy)

    @property
    def loss_settings(self) -> LossSettings:
        return _plugin_settings("adapt.loss", self.adapt.loss)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run.name


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, and check all of it.

    Raises:
        ConfigError: the file cannot be read, or a setting is not allowed; the message names the
            key, what came and what is allowed.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    malformed = [o for o in overrides if "=" not in o]
    if malformed:
        raise ConfigError(f"an override has the form key.sub=value; got {malformed[0]!r}")
    try:
        given, changes = OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        for section in PLUGIN_SECTIONS:
            _forget_other_kind(given, changes, section)
        merged = OmegaConf.merge(given, changes)
        raw = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not YAML: {error}") from error
        raise
    config = _convert(raw, Config, "")
    _check_together(config)
    return config


def _forget_other_kind(given: Any, changes: Any, section: str) -> None:
    """An override of ``kind`` leaves behind the file's fields that only the old kind has."""
    old, new = OmegaConf.select(given, section), OmegaConf.select(changes, section)
    registry, default = PLUGIN_SECTIONS[section]
    if not OmegaConf.is_dict(old) or not OmegaConf.is_dict(new) or "kind" not in new:
        return
    kinds = [old.get("kind", default), new.get("kind")]
    known = {plugin.name: plugin.cls for plugin in registry.plugins()}
    if any(kind not in known for kind in kinds):
        return  # the unknown kind is named when the section is checked
    fields = [{f.name for f in msgspec.structs.fields(known[kind].Settings)} for kind in kinds]
    for name in fields[0] - fields[1]:
        old.pop(name, None)


def _convert(raw: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, tail = str(error).partition(" - at `$")
        key = ".".join(part for part in (where, tail.strip("`").lstrip(".")) if part)
        came = _lookup(raw, tail.strip("`").lstrip("."))
        shown = "" if came is None or isinstance(came, dict | list) else f", got {came!r}"
        allowed = ""
        if "unknown field" in message:
            allowed = _allowed_fields(kind, tail.strip("`").lstrip("."))
        raise ConfigError(f"{key or 'configuration'}: {message}{shown}{allowed}") from error


def _lookup(raw: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        if not isinstance(raw, dict) or part not in raw:
            return None
        raw = raw[part]
    return raw


def _allowed_fields(kind: Any, path: str) -> str:
    for part in filter(None, path.split(".")):
        field = next((f for f in msgspec.structs.fields(kind) if f.name == part), None)
        if field is None or not isinstance(field.type, type):
            return ""
        kind = field.type
    names = ", ".join(field.name for field in msgspec.structs.fields(kind))
    return f"; allowed here: {names}"


def _plugin_settings(section: str, raw: dict[str, Any]) -> Any:
    registry, default = PLUGIN_SECTIONS[section]
    kind = raw.get("kind", default)
    if not isinstance(kind, str):
        raise ConfigError(f"{section}.kind: required, the name of a {registry.role}")
    try:
        cls = registry.get(kind)
    except PluginError as error:
        raise ConfigError(f"{section}.kind: {error}") from error
    return _convert({**raw, "kind": kind}, cls.Settings, section)


def split_arm(arm: str) -> tuple[str, bool]:
    """``frozen+window`` is ``("frozen", True)``."""
    base = arm.removesuffix(WINDOW_SUFFIX)
    return base, base != arm


def _check_together(config: Config) -> None:
    """What no single key can say."""
    drafter, loss = config.drafter_settings, config.loss_settings
    _ = config.policy_settings
    if not getattr(LOSSES.get(loss.kind)(loss), "teaches", True):
        raise ConfigError(
            f"adapt.loss.kind: {loss.kind!r} does not look at the target, so the draft would stay as "
            f"it is; make it a term of `sum`, beside one that does"
        )
    bases = [split_arm(arm) for arm in config.arms]
    for arm, (base, windowed) in zip(config.arms, bases, strict=True):
        if base not in BASE_ARMS or (base == "plain" and windowed):
            raise ConfigError(
                f"arms: unknown arm {arm!r}; there are {', '.join(BASE_ARMS)}, and with "
                f"{WINDOW_SUFFIX} behind them frozen and adapted"
            )
        if windowed and drafter.window is None:
            raise ConfigError(f"arms: {arm!r} needs drafter.window, the tokens that the draft sees")
    if len(set(config.arms)) != len(config.arms):
        raise ConfigError(f"arms: the same arm twice in {list(config.arms)}")
    workload, engine, replay = config.workload, config.engine, config.adapt.replay
    if engine.kind == "trace":
        if engine.trace is None:
            raise ConfigError("engine.trace: required when engine.kind is trace, a recorded folder")
        if loss.rows == "all":
            raise ConfigError(
                "adapt.loss.rows: 'all' needs rows after a refusal, which a trace does not have; "
                "use 'accepted' or 'delayed', or engine.kind: embedded"
            )
    elif engine.kind == "sglang":
        if workload.documents is not None:
            raise ConfigError("workload.documents: SGLang decides its own text; use prompts")
        if config.adapt.scope.state == "per_request":
            raise ConfigError("adapt.scope.state: SGLang serves one draft to all; use shared")
    elif (workload.prompts is None) == (workload.documents is None):
        raise ConfigError("workload: give exactly one of prompts and documents")
    if workload.documents is not None and loss.rows == "all":
        raise ConfigError("adapt.loss.rows: 'all' needs drafted text; documents are forced")
    adapted = any(base == "adapted" for base, _ in bases)
    if adapted and config.adapt.scope.state == "per_request" and engine.max_batch != 1:
        raise ConfigError(
            f"adapt.scope.state: per_request keeps one draft for each request, so "
            f"engine.max_batch must be 1, got {engine.max_batch}; use state: shared"
        )
    if replay.window > replay.max_tokens:
        raise ConfigError(
            f"adapt.replay.max_tokens: {replay.max_tokens} holds no request of "
            f"adapt.replay.window = {replay.window} rows"
        )
    if replay.window <= drafter.num_draft_tokens + 1:
        raise ConfigError(
            f"adapt.replay.window: {replay.window} holds no path of drafter.num_draft_tokens = "
            f"{drafter.num_draft_tokens} tokens behind an anchor; use at least "
            f"{drafter.num_draft_tokens + 2}"
        )


def check_paths(config: Config) -> None:
    """Every folder and file that the configuration names exists.

    Raises:
        ConfigError: one is missing; the message names its key.
    """
    workload, engine = config.workload, config.engine
    named = {"target.path": config.target.path, "drafter.path": config.drafter_settings.path}
    if engine.kind == "trace":
        named["engine.trace"] = engine.trace or ""
    elif workload.documents is not None:
        named["workload.documents"] = workload.documents
    elif workload.prompts is not None:
        named["workload.prompts"] = workload.prompts
    for key, path in named.items():
        if not Path(path).exists():
            raise ConfigError(f"{key}: nothing at {path}")


def to_yaml(config: Config) -> str:
    """The whole configuration, every default written out."""
    raw = msgspec.to_builtins(config)
    raw["drafter"] = msgspec.to_builtins(config.drafter_settings)
    raw["adapt"]["policy"] = msgspec.to_builtins(config.policy_settings)
    raw["adapt"]["loss"] = msgspec.to_builtins(config.loss_settings)
    return OmegaConf.to_yaml(OmegaConf.create(raw))
