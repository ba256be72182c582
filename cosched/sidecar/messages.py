"""What a server and its trainer tell each other: the headers, checked by their types alone.

A header holds numbers and names; tensors lie behind it as raw bytes, whose number follows from the header
(``rows``, ``weights``). Nothing here is believed before it has been checked, and nothing is allocated for
what a header merely says.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Id = Annotated[str, Meta(max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Small = Annotated[int, Meta(ge=0, le=1 << 20)]
Seconds = Annotated[float, Meta(ge=0)]
MOST_KEPT = 1024  # versions that are told of
MOST_REQUESTS = 8192  # of a round: as many as an engine runs at once, twice


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """One of those below.

    ``to`` is who it is for, as that one has named itself anew at its start: what was recorded and is sent
    again reaches nobody. Only ``Hello`` and ``Unknown`` are for whoever hears them.
    """

    to: Id = ""


class RowForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Width and type of rows, the same on both sides; no features where the drafter wants none."""

    feature_width: Small
    teacher_width: Small
    feature_type: Id
    teacher_type: Id


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where on this machine a server's rows lie: a file without a name that its process has open."""

    pid: Annotated[int, Meta(ge=1, le=1 << 30)]
    descriptor: Annotated[int, Meta(ge=0, le=1 << 20)]
    name: Id
    slots: Annotated[int, Meta(ge=1, le=1 << 16)]
    slot_bytes: Count


class SegmentHead(msgspec.Struct, frozen=True, array_like=True):
    """A ``Segment`` without its tensors."""

    request_id: Name
    start: Annotated[int, Meta(ge=0, le=1 << 24)]
    rows: Small
    features: bool
    teacher: bool
    temperature: Seconds


class BlockHead(msgspec.Struct, frozen=True, array_like=True):
    """A ``ServedBlock`` without its tensors."""

    request_id: Name
    anchor: Annotated[int, Meta(ge=0, le=1 << 24)]
    drafted: Annotated[int, Meta(ge=0, le=1 << 10)]
    teacher: bool
    num_accepted: Annotated[int, Meta(ge=0, le=1 << 10)]
    num_committed: Annotated[int, Meta(ge=0, le=1 << 10)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the draft: its name in the network, its shape and its type."""

    name: Name
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...], Meta(max_length=8)]
    dtype: Id


Parts = Annotated[tuple[Part, ...], Meta(max_length=1 << 16)]

# --- from a server ----------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """A server is there. ``server`` is its name from now on, ``settings`` are those of learning.

    ``version`` serves there, with that ``checksum``; ``draft`` is the checksum of the draft as loaded,
    which ``as_loaded`` says is what serves. ``window``, ``acceptance`` and ``num_draft_tokens`` are the
    engine's.
    """

    server: Id
    draft: Id
    settings: dict[str, Any]
    window: Count | None
    acceptance: Id
    num_draft_tokens: Small
    form: RowForm
    version: Count
    checksum: Id
    as_loaded: bool
    memory: Memory | None = None


class Rounds(Message, frozen=True, kw_only=True):
    """A round, served by ``version``. ``slot`` is where its tensors lie; None: behind this header.

    ``number`` rises from message to message. ``dropped`` counts rounds that the server had no room for,
    in all; requests that have ended in one of those are among ``finished``.
    """

    number: Count
    version: Count
    slot: Small | None
    size: Count
    segments: Annotated[tuple[SegmentHead, ...], Meta(max_length=MOST_REQUESTS)]
    blocks: Annotated[tuple[BlockHead, ...], Meta(max_length=MOST_REQUESTS)]
    finished: Annotated[tuple[Name, ...], Meta(max_length=1 << 16)]
    draft_seconds: Seconds
    verify_seconds: Seconds
    num_running: Small
    tokens_left: Count | None
    num_queued: Small
    dropped: Count
    plain_share: Seconds | None = None


class Alive(Message, frozen=True, kw_only=True):
    """The server is there. ``checksum`` is that of what serves there as ``version``.

    ``received`` is the newest version that has come whole; a server that is off does not serve it.
    """

    version: Count
    checksum: Id
    received: Count


class Served(Message, frozen=True, kw_only=True):
    """The weights that serve, for a trainer that was asked for none yet; they lie behind this header."""

    version: Count
    parts: Parts


class RollBack(Message, frozen=True, kw_only=True):
    """Somebody wants an earlier version to serve, everywhere."""

    version: Count


class Bye(Message, frozen=True, kw_only=True):
    """The server ends."""


FromServer = Hello | Rounds | Alive | Served | RollBack | Bye

# --- from the trainer -------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """A server is known: as ``trainer`` it addresses who says so. ``shared``: its memory is seen."""

    trainer: Id
    shared: bool


class Refused(Message, frozen=True, kw_only=True):
    """A server does not go with this trainer."""

    reason: Text


class Unknown(Message, frozen=True, kw_only=True):
    """Whoever sent that is to say hello first: the trainer is another than it was."""


class Taken(Message, frozen=True, kw_only=True):
    """Everything up to ``number`` has been taken in; and how training goes.

    ``kept`` are the newest of the versions that the trainer can go back to, beside the draft as loaded.
    """

    number: Count
    version: Count
    updates: Count
    skipped_steps: Count
    loss: float | None
    kept: Annotated[tuple[Count, ...], Meta(max_length=MOST_KEPT)] = ()


class Version(Message, frozen=True, kw_only=True):
    """A version to serve. ``parent`` is the one that it was learnt from, ``checksum`` that of the draft.

    ``as_loaded``: it is the draft as loaded, and nothing lies behind this header.
    """

    version: Count
    parent: Count
    checksum: Id
    as_loaded: bool
    parts: Parts


class Ask(Message, frozen=True, kw_only=True):
    """The trainer, which knows of no version yet, wants the weights that serve, to go on from there."""


FromTrainer = Welcome | Refused | Unknown | Taken | Version | Ask
