"""What learning should cost on an H200 that serves Qwen3-8B; benchmarks/gpu_model.md explains it.

Usage: python benchmarks/gpu_model.py        prints the tables that are in gpu_model.md

Letters: R requests, C context rows of each, A anchors of all of them together, K drafted tokens,
n parameters that are trained. Sizes are in parameters, which is multiplications of one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosched.plan import roofline
from cosched.plan.roofline import LAYER, PUBLISH_BYTES, SCHEDULING, SCORE_BYTES, STEP_BYTES, WAIT

Precision = Literal["float32", "bfloat16"]
Mode = Literal["eager", "graph"]

# An H200, as far as products and copies get of what is printed on it (67 and 989 TFLOP/s, 4.8 TB/s).
FLOPS: dict[Precision, float] = {"float32": 50e12, "bfloat16": 500e12}
BYTES = 4.0e12  # a second
LAUNCH: dict[Mode, float] = {"eager": roofline.LAUNCH, "graph": roofline.GRAPHED}

ANCHORS = 64  # of a micro-step, shared by its requests
ROUNDS = 32  # from one update to the next
COLLECTING = 12  # operations of a round's tap and collection, whatever the batch


@dataclass(frozen=True)
class Sizes:
    """A decoder: width, inner width of its MLP, of all queries, of all keys, tokens, layers."""

    width: int
    inner: int
    queries: int
    keys: int
    vocab: int
    layers: int

    @property
    def keys_values(self) -> int:
        return 2 * self.width * self.keys

    @property
    def rest(self) -> int:
        """A layer without its keys and values."""
        return 2 * self.width * self.queries + 3 * self.width * self.inner

    @property
    def head(self) -> int:
        return self.width * self.vocab


@dataclass(frozen=True)
class Draft:
    """A draft as products that a row of each kind goes through.

    ``context`` is that of a row behind which anchors lie, of which ``fused`` takes the target's
    features, whose gradient nobody wants; ``first`` that of an anchor's own row, ``further`` that of
    each of ``others`` which it drafts from. ``attends`` is the width of the queries of all layers
    that look at the context. ``launches`` are operations of a micro-step and ``forward`` those of
    its ``replay``, counted on narrow drafts of as many layers (tests/test_gpu_model.py counts again).
    Serving runs ``layers`` layers ``serial`` times a round.
    """

    window: int
    path: int
    context: int
    fused: int
    first: int
    further: int
    others: int
    attends: int
    context_attends: bool
    head: int
    trains_head: bool
    teacher: int
    trained: int
    tensors: int
    launches: int
    forward: int
    layers: int
    serial: int
    read: int


def eagle3(target: Sizes, words: int, window: int = 512, path: int = 4) -> Draft:
    """One layer, whose input is twice as wide, and a head of its own over some words."""
    width = target.width
    fused = 3 * width * width
    keys_values = 2 * target.keys_values
    rest = target.rest + width * target.queries  # of twice the width
    head = width * words
    return Draft(
        window, path, context=fused + keys_values, fused=fused, first=rest,
        further=rest + keys_values, others=path - 1, attends=target.queries, context_attends=False,
        head=head, trains_head=True, teacher=head, trained=fused + keys_values + rest + head,
        tensors=13, launches=811, forward=267, layers=1, serial=path,
        read=rest + keys_values + head,
    )  # fmt: skip


def dflash(
    target: Sizes, layers: int = 5, features: int = 5, window: int = 512, path: int = 15
) -> Draft:
    """A block of the anchor and its masks sees keys that are made of the target's features."""
    fused = features * target.width * target.width
    block = layers * (target.rest + target.keys_values)
    return Draft(
        window, path, context=fused + layers * target.keys_values, fused=fused, first=block,
        further=block, others=path, attends=layers * target.queries, context_attends=False,
        head=target.head, trains_head=False, teacher=target.head, trained=fused + block, tensors=58,
        launches=1306, forward=404, layers=layers, serial=1, read=fused + block + target.head,
    )  # fmt: skip


def pard(target: Sizes, own: Sizes, window: int = 256, path: int = 8) -> Draft:
    """A language model of its own that runs over the text and, behind each anchor, over masks."""
    model = own.layers * (own.rest + own.keys_values)
    return Draft(
        window, path, context=model, fused=0, first=0, further=model, others=path - 1,
        attends=own.layers * own.queries, context_attends=True, head=own.head, trains_head=True,
        teacher=target.head, trained=model + own.head, tensors=310, launches=9497, forward=2932,
        layers=own.layers, serial=1, read=model + own.head,
    )  # fmt: skip


QWEN3_8B = Sizes(4096, 12_288, 4096, 1024, 151_936, 36)
DRAFTS = {  # Qwen3-8B's EAGLE-3 head of SpecForge, Qwen3-8B-DFlash-b16, PARD-Qwen3-0.6B
    "eagle3": eagle3(QWEN3_8B, words=32_000),
    "dflash": dflash(QWEN3_8B),
    "pard": pard(QWEN3_8B, Sizes(1024, 3072, 2048, 1024, 151_936, 28)),
}


@dataclass(frozen=True)
class Expected:
    """In seconds; ``share`` is what learning takes of the time, ``watching`` what a tap adds."""

    flops: float
    update: float
    publication: float
    scores: float
    round: float
    watching: float
    share: float


@dataclass(frozen=True)
class Work:
    """Operations of a micro-step: the student's and its head's forwards, back, the teacher's."""

    student: float
    head: float
    back: float
    teacher: float

    @property
    def whole(self) -> float:
        return self.student + self.head + self.back + self.teacher


def work(draft: Draft, requests: int) -> Work:
    """A multiplication and an addition are two operations."""
    share = max(1, ANCHORS // requests)
    anchors, context = share * requests, requests * draft.window
    rows = context * draft.context + anchors * (draft.first + draft.others * draft.further)
    own = 1 if draft.first else 0
    looks = anchors * (own + draft.others) + (context if draft.context_attends else 0)
    student = 2.0 * (rows + 2 * looks * draft.window * draft.attends)
    head = 2.0 * draft.head * anchors * draft.path
    # Back there are twice as many as forwards, and to a head that is frozen as many.
    back = 2 * (student - context * draft.fused) + (2 if draft.trains_head else 1) * head
    differ = requests * (share + draft.path - 1)  # neighbours' paths overlap
    return Work(student, head, back, 2.0 * draft.teacher * differ)


def round_seconds(
    draft: Draft, requests: int, target: Sizes = QWEN3_8B, length: int = 1024
) -> float:
    """Verification and proposal as CUDA graphs: weights and caches are read, each once."""
    weights = target.layers * (target.rest + target.keys_values) + target.head
    flops = 2.0 * weights * requests * (draft.path + 1)
    verify = max(2 * weights / BYTES, flops / FLOPS["bfloat16"])
    cache = requests * length * 2 * 2 * target.layers * target.keys / BYTES
    launches = LAYER * (target.layers + draft.layers * draft.serial)
    propose = draft.serial * 2 * draft.read / BYTES
    return verify + cache + propose + launches * LAUNCH["graph"] + SCHEDULING


def expected(kind: str, requests: int, precision: Precision, mode: Mode = "eager") -> Expected:
    """An update between two rounds, with so many requests in the batch and in the sample."""
    draft, speed, launch = DRAFTS[kind], FLOPS[precision], LAUNCH[mode]
    done = work(draft, requests)
    device = done.whole / speed + STEP_BYTES * draft.trained / BYTES
    update = max(device, launch * draft.launches) + WAIT
    publication = PUBLISH_BYTES * draft.trained / BYTES + launch * draft.tensors + WAIT
    passes = (2 * (done.student + done.head) + done.teacher) / speed
    device = passes + 2 * SCORE_BYTES * draft.trained / BYTES
    scores = max(device, launch * 2 * draft.forward) + WAIT
    round_ = round_seconds(draft, requests)
    watching = COLLECTING * LAUNCH["eager"] / round_
    spent = update + publication + scores / 2  # every second update is scored
    share = spent / (ROUNDS * round_ * (1 + watching) + spent)
    return Expected(done.whole, update, publication, scores, round_, watching, share)


def tables() -> str:
    lines = [
        "| draft | requests | a round, ms | watching | TFLOP of an update | publication, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in DRAFTS:
        for requests in (1, 16):
            one = expected(kind, requests, "bfloat16")
            lines.append(
                f"| {kind} | {requests} | {1e3 * one.round:.1f} | {one.watching:.1%} | "
                f"{one.flops / 1e12:.1f} | {1e3 * one.publication:.1f} |"
            )
    lines += [
        "",
        "| draft | requests | products in | launched | update, ms | scores, ms | share of the time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ways: list[tuple[Precision, Mode]] = [
        ("float32", "eager"), ("bfloat16", "eager"), ("bfloat16", "graph")
    ]  # fmt: skip
    for kind in DRAFTS:
        for requests in (1, 16):
            for precision, mode in ways:
                one = expected(kind, requests, precision, mode)
                lines.append(
                    f"| {kind} | {requests} | {precision} | {mode} | {1e3 * one.update:.1f} | "
                    f"{1e3 * one.scores:.1f} | {one.share:.0%} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
