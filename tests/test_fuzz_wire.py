"""Damaged messages between servers and their trainer: a clear refusal, or a message; nothing else."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from cosched.sidecar.link import as_tensor
from cosched.sidecar.messages import (
    Alive,
    Ask,
    Bye,
    FromServer,
    FromTrainer,
    Hello,
    Memory,
    Message,
    Refused,
    RollBack,
    Rounds,
    Served,
    Taken,
    Unknown,
    Version,
    Welcome,
)  # fmt: skip
from cosched.sidecar.rows import unpack
from cosched.sidecar.weights import pack_weights, unpack_weights
from cosched.sidecar.wire import MAGIC, Codec, FrameError
from tests.helpers.fuzz import (
    LONGEST_MESSAGE,
    cases,
    damaged_bytes,
    damaged_tree,
    little_memory,
)
from tests.helpers.sidecar_rows import FORM, VOCAB, make_queue, make_round

KEY = b"k" * 32
KNOWN = {"a.weight": torch.ones(3, 4), "b": torch.zeros(5).bfloat16()}
PARTS, WEIGHTS = pack_weights(KNOWN)
HELLO = Hello(
    server="s", draft="d", settings={"run.seed": 0, "adapt.loss": {"kind": "forward_kl"}}, window=8,
    acceptance="greedy", num_draft_tokens=3, form=FORM, version=0, checksum="c", as_loaded=True,
    memory=Memory(1, 3, "rows", 4, 1 << 12),
)  # fmt: skip


def with_rows() -> list[tuple[Message, bytes]]:
    """A round as it is sent, with a request that has ended and with several."""
    found: list[tuple[Message, bytes]] = []
    for finished in (False, True):
        queue = make_queue()
        queue.put(make_round(finished=finished), version=3)
        sent = queue.next()
        assert sent is not None
        found.append((msgspec.structs.replace(sent[0], slot=None), sent[1].numpy().tobytes()))
    return found


SERVERS: list[tuple[Message, bytes]] = [
    (HELLO, b""),
    *with_rows(),
    (Alive(version=3, checksum="c", received=3), b""),
    (Served(version=3, parts=PARTS), WEIGHTS.numpy().tobytes()),
    (RollBack(version=1), b""),
    (Bye(), b""),
]
TRAINERS: list[tuple[Message, bytes]] = [
    (Welcome(trainer="t", shared=True), b""),
    (Refused(reason="another draft"), b""),
    (Unknown(), b""),
    (Taken(number=3, version=2, updates=9, skipped_steps=0, loss=0.5, kept=(1, 2)), b""),
    (Version(version=3, parent=2, checksum="c", as_loaded=False, parts=PARTS), WEIGHTS.numpy().tobytes()),
    (Ask(), b""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("side", "reads", "samples"),
    [("server", FromServer, SERVERS), ("trainer", FromTrainer, TRAINERS)],
)
def test_a_damaged_message_is_one_clear_refusal(
    side: str, reads: Any, samples: list[tuple[Message, bytes]]
) -> None:
    """From a peer that has the key, so that all of it is read: a value that is none, a tensor of another
    size, bytes that are too few. What is taken is of the sizes that are known here."""
    codec: Codec[Any] = Codec(KEY, reads)
    heard = 0
    with little_memory():
        for case, rng in cases(f"frames {side}", 1000):
            message, payload = rng.choice(samples)
            header = damaged_header(rng, message)
            rows = bytearray(damaged_bytes(rng, payload) if rng.random() < 0.3 else payload)
            head = MAGIC + codec._mac(header, codec.digest(rows)) + header
            try:
                read(codec, head, rows)
                heard += 1
            except FrameError as error:
                said = str(error)
                assert 0 < len(said) <= LONGEST_MESSAGE, f"input {case}: {said[:300]}"
            except Exception as error:
                raise AssertionError(f"input {case}: {error!r}, for {header[:300]!r}") from error
    assert heard  # some of it is as good as new


def damaged_header(rng: random.Random, message: Message) -> bytes:
    whole = msgspec.msgpack.encode(message)
    if rng.random() < 0.3:
        return damaged_bytes(rng, whole)
    try:
        return msgspec.msgpack.encode(damaged_tree(rng, msgspec.msgpack.decode(whole)))
    except (OverflowError, TypeError, UnicodeEncodeError):  # what MessagePack has not
        return damaged_bytes(rng, whole)


def read(codec: Codec[Any], head: bytes, rows: bytearray) -> None:
    """As service and link do."""
    message, payload = codec.decode([head, rows])
    match message:
        case Rounds():
            round_ = unpack(message, as_tensor(payload), FORM, VOCAB, "me")
            assert all(int(one.tokens_R1.max()) < VOCAB for one in round_.segments)
        case Served() | Version(as_loaded=False):
            weights = unpack_weights(message.parts, as_tensor(payload), KNOWN)
            assert all(weights[name].shape == KNOWN[name].shape for name in weights)
        case _:
            pass
