"""The sections of a file, each with its keys, what they may be, and what they are where left out.

Those whose fields depend on their ``kind`` (drafter, policy, loss, objective) are plain data here:
``plugin_settings`` checks them against the ``Settings`` of the plugin of that name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from cosched.guard.settings import FiniteSettings, ShadowSettings
from cosched.records import TeacherForm
from cosched.settings.hub import model_folder

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^\w[\w.@-]*$")]  # what may be a folder's name
NotNegative = Annotated[float, Meta(ge=0)]
TrackerName = Literal["tensorboard", "wandb"]
Files = str | Annotated[tuple[str, ...], Meta(min_length=1)] | None  # one, or several


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the file: unknown keys are refused, nothing changes after loading."""


class RunSettings(Section, frozen=True):
    """``run``: the folder ``name`` in ``dir`` gets the results; ``seed`` is that of all randomness.

    ``trackers`` draw acceptance, versions, losses, the guard's evidence and speed of each arm, of a server or a
    trainer, while it goes on, into its folder. They are extras:
    ``pip install 'cosched[trackers]'``.
    """

    name: str
    dir: str = "runs"
    seed: Annotated[int, Meta(ge=0)] = 0
    trackers: tuple[TrackerName, ...] = ()


class EngineSettings(Section, frozen=True):
    """``engine``: what decodes. ``trace`` is the folder that ``kind: trace`` replays.

    ``device`` is ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``; ``dtype`` is that
    of the weights of target and draft; ``max_batch`` requests are decoded at once; ``num_threads`` are
    CPU threads (null: what torch takes, and one where SGLang serves on a CPU).

    A trace has the target's rows; ``live`` computes them all the same, which takes the time that
    verification takes: to compare speeds on the same text.
    With ``kind: sglang``, ``arguments`` are SGLang's own, as ``sglang.Engine`` names them.

    ``acceptance`` is how drafted tokens of a text that is sampled are accepted, without SGLang: they are
    ``sampled`` from the draft, and kept by speculative sampling; or the draft's best ones, which stay if
    the target draws them (``target_only``), as SGLang does it. The text has the target's distribution
    with both; greedy text knows no difference.

    ``tree_rule`` is how trees are drawn and verified where the first of these holds: siblings one after
    the other without replacement, and by ``recursive`` rejection; or independently, and by
    ``k_sequential`` selection (``cosched.engines.embedded.tree_rules``).

    ``pack`` lays out the weights of linear layers once for this CPU (``cosched.engines.embedded.packing``); it means
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
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    num_threads: Positive | None = None
    trace: str | None = None
    live: bool = False
    acceptance: Literal["sampled", "target_only"] = "sampled"
    tree_rule: Literal["recursive", "k_sequential"] = "recursive"
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
    or ShareGPT's ``{"conversations": [{"from": …, "value": …}]}``; or questions alone, as benchmarks
    have them (MT-Bench, Spec-Bench, SPEED-Bench): ``{"turns": ["…", …]}``. Optionally with ``id``
    (``question_id`` beside ``turns``), and ``tenant``, whose it is. An answer that ends a conversation is left
    out: it is no question. ``turns`` answers the last so many questions of each, one after the other: before the
    first is what the file has, between them the target's own answers. Of questions alone it answers the
    first so many. Each turn is a request, of
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
    """``record``: what is kept of texts.

    A server keeps neither prompts nor answers unless ``text`` is on: then those of a share ``text_share``
    of the requests, in ``texts.jsonl`` in the folder of its start, for its own user alone and the newest 64
    to 128 MB. A request with ``"custom_params": {"cosched_record": false}`` is left out; only ``/generate``,
    ``/v1/completions`` and ``/v1/chat/completions`` take that. Only a server reads
    these two; a run has its texts from a file.

    ``--record`` stores a trace, in ``dtype`` (float32: exact).
    A request that would take the folder above ``max_bytes`` is left out and counted.

    ``feature_layers`` are stored beside those that the drafter needs, so that other drafters can be
    judged on the same trace ("after that layer", 0-based).
    """

    text: bool = False
    text_share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    feature_layers: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_bytes: Positive = 2147483648


class ReplaySettings(Section, frozen=True):
    """``adapt.replay``: rows kept of each request, and how many are trained on.

    ``window`` rows of context are kept of each request, as far as ``adapt.memory`` allows; a
    micro-step trains on at most ``anchors`` of them. A draft learns to look as far back as ``window``
    reaches: give it the length that it serves.
    ``keep_finished`` keeps a request's rows until others need the room: to train when idle.
    ``fresh`` trains on each anchor once at most, in the first update after it.
    ``teacher`` is the form in which the target's rows wait: ``hidden``, its last hidden state, from
    which its head gives the logits again; ``logits``, all of them; ``top_k``, the ``teacher_top_k``
    best of them and the mass of the rest, which is taken to be shared evenly. The last two know no
    more of a prompt than its last row.
    """

    replaced: ClassVar[dict[str, str]] = {
        "max_tokens": "adapt.memory.max_tokens",
        "max_bytes": "adapt.memory.max_bytes",
    }
    window: Positive = 128
    anchors: Positive = 64
    teacher: TeacherForm = "hidden"
    teacher_top_k: Positive = 64
    keep_finished: bool = False
    fresh: bool = False


class MemorySettings(Section, frozen=True):
    """``adapt.memory``: what learning may hold at once.

    ``max_tokens`` rows and ``max_bytes`` are kept of all requests together in the replay buffer; a
    request for which there is no room takes that of those heard of longest ago, and is counted.
    ``chunk_rows``: rows of logits held at once, by the loss and by a guard that scores; null: all.
    They are recomputed in the backward pass.
    """

    max_tokens: Positive = 65536
    max_bytes: Positive = 268435456
    chunk_rows: Positive | None = None


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
    there is one, 0 takes the same steps and spares it copies of all weights and gradients, and the
    host several waits for the device in each step. ``auto`` is 0 where one rank trains, else 1.
    ``offload_optimizer`` keeps, in stages 1 and 2, moments and masters in the host's memory and steps there
    (ZeRO-Offload): on a GPU that spares twelve bytes for each trained parameter, and gradients and weights cross
    the bus in each step. It was never run on a GPU.
    ``background`` trains beside the decoding and publishes when it is done: on a CPU in a process of
    its own, which has half of the threads while it works and beside SGLang a lower priority, on a GPU
    in a thread with a stream of its own. Off, the engine waits for each update, and runs repeat exactly.
    A process that ends, or gives no answer for ``limit_seconds``, is started again, from the weights
    that serve, while decoding goes on; after ``restarts`` times without an update between them learning
    stops. These three are of a colocated draft: a sidecar refuses other values.
    ``gradient_accumulation_steps`` groups of the requests in a batch are gone over one after the other before
    each step of the optimizer, so that one at a time has activations in memory; the gradient is that of all.
    A request is never divided: one that runs alone needs what it needs without.
    ``precision`` is that of matrix products; ``auto`` is bfloat16 where the device multiplies it
    faster, so that results differ from one machine to another.
    ``cuda_graph`` has a GPU repeat loss and gradients of a micro-step, captured at the start, so that the
    host hands over one thing in place of hundreds or thousands; batches are filled up to a few sizes
    for it with rows that weigh nothing. ``auto`` does so where one rank trains one draft for all in
    stage 0 and the drafter can be captured; ``always`` is refused where something stands against it. It
    was never run on a GPU, and by count it helps PARD (``benchmarks/gpu_model.md``): so ``never``.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal["auto", 0, 1, 2] = "auto"
    lr: Annotated[float, Meta(gt=0)] = 3e-4
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    weight_decay: NotNegative = 0.0
    gradient_accumulation_steps: Positive = 1
    offload_optimizer: bool = False
    background: bool = False
    limit_seconds: Annotated[float, Meta(gt=0)] = 600.0
    restarts: Annotated[int, Meta(ge=0)] = 3
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    cuda_graph: Literal["auto", "never", "always"] = "never"

    def stage_of(self, num_ranks: int) -> int:
        """ZeRO's stage where so many ranks train together."""
        if self.zero_stage == "auto":
            return 1 if num_ranks > 1 or self.offload_optimizer else 0
        return self.zero_stage


class PublishSettings(Section, frozen=True):
    """``adapt.publish``: ``target_check_every`` of them checksum all of the target, each a slice; 0: none.

    ``keep`` is how many of the newest versions are kept in memory, that which serves among them; each
    can be served again, and so can the draft as it was loaded. With 1 that is all there is to go back
    to; each more takes the draft's size once.
    """

    replaced: ClassVar[dict[str, str]] = {
        "save_at_end": "adapt.checkpoint.at_end",
        "save_every": "adapt.checkpoint.every_updates",
        "saves_kept": "adapt.checkpoint.keep",
    }
    target_check_every: Annotated[int, Meta(ge=0)] = 16
    keep: Positive = 1


class CheckpointSettings(Section, frozen=True):
    """``adapt.checkpoint``: what a server or a run saves, to be gone on from with ``--resume``.

    A checkpoint has all that the next update depends on, and a server's has the draft in its public
    format. A server's is taken between two rounds with every ``every_updates`` updates,
    ``every_minutes`` minutes (null: neither), and ``at_end``, when the server is told to stop (SIGTERM)
    and has answered everybody. Rounds wait while it is copied in memory, which takes five to eight times
    the draft's size for a while, and not for the disk.
    ``cosched run`` takes one behind a group of requests, when none is running: behind each, or where
    ``every_updates`` (of any arm) or ``every_minutes`` is set, behind the first since so many.
    ``at_end`` holds the newest in memory until it is saved, when the run is interrupted (SIGTERM,
    Ctrl-C) or fails. It is of all arms, so that variants and drafts have none of their own.
    The newest ``keep`` stay.
    """

    every_updates: Positive | None = None
    every_minutes: Annotated[float, Meta(gt=0)] | None = None
    at_end: bool = True
    keep: Positive = 2

    def due(self, updates: int, seconds: float) -> bool:
        """Whether so many updates, or so long a time, since the one before are enough."""
        enough = self.every_updates is not None and updates >= self.every_updates
        return enough or (self.every_minutes is not None and seconds >= 60 * self.every_minutes)


class SidecarSettings(Section, frozen=True):
    """``adapt.sidecar``: where ``cosched train`` is, for ``adapt.placement: sidecar``.

    ``address`` is ZeroMQ's, ``ipc://PATH`` (a socket of this machine) or ``tcp://HOST:PORT``. The trainer
    binds it, and any number of servers connect to it. ``key_file`` has the key that trainer and servers
    share, of at least 16 bytes: every message is signed with it. Without one the address must be of this
    machine: a socket, or a port of the loopback. A key proves who speaks and hides nothing, so keep the
    port closed to strangers all the same.
    ``device`` is what trains, as ``engine.device`` says what decodes, each with ``engine.num_threads``.
    ``queue_rounds`` of a server wait at most to be sent; the oldest goes where there is no room, and is
    counted. Who says nothing for ``limit_seconds`` is taken for lost, by the other side.
    """

    address: str | None = None
    key_file: str | None = None
    device: str = "cpu"
    queue_rounds: Annotated[int, Meta(ge=16, le=4096)] = 64
    limit_seconds: Annotated[float, Meta(ge=2)] = 15.0


class AdaptSettings(Section, frozen=True):
    """``adapt``: how the arm ``adapted`` learns, and what the variants begin from.

    ``placement`` is where it learns: ``colocated`` with what decodes, or in a ``sidecar``, a process of
    its own (``cosched train``) that several servers may share; these serve what it publishes.

    ``policy``, ``loss``, ``objective`` and ``guard`` have the fields of their ``kind``. What a file
    leaves out, the kind of these or ``trainer.lr`` or ``replay.anchors``, is that of the drafter's
    type (``schedulers/defaults.py``).
    """

    placement: Literal["colocated", "sidecar"] = "colocated"
    policy: dict[str, Any] = msgspec.field(default_factory=dict)
    loss: dict[str, Any] = msgspec.field(default_factory=dict)
    objective: dict[str, Any] = msgspec.field(default_factory=dict)
    replay: ReplaySettings = ReplaySettings()
    memory: MemorySettings = MemorySettings()
    scope: ScopeSettings = ScopeSettings()
    trainer: TrainerSettings = TrainerSettings()
    guard: FiniteSettings | ShadowSettings = ShadowSettings()
    publish: PublishSettings = PublishSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    sidecar: SidecarSettings = SidecarSettings()


class Draft(Section, frozen=True):
    """One of ``drafts``: what its arms have as ``drafter``, ``adapt`` and ``variants``, each whole."""

    drafter: dict[str, Any]
    adapt: AdaptSettings
    variants: dict[str, AdaptSettings]
