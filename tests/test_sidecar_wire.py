"""What a server and its trainer send each other: read as it was written, or refused before it costs."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from cosched.errors import ConfigError, ServerError
from cosched.records import Segment, VerifyRound
from cosched.sidecar.messages import Alive, FromServer, FromTrainer, Rounds, Version
from cosched.sidecar.rows import unpack
from cosched.sidecar.sockets import let_go, listening
from cosched.sidecar.weights import pack_weights, unpack_weights
from cosched.sidecar.wire import LONGEST_HEADER, MAGIC, Codec, FrameError, read_key
from tests.helpers.sidecar_rows import FORM, VOCAB, make_queue, make_round

KEY = b"k" * 32


def sent(round_: VerifyRound, window: int = 8) -> tuple[Rounds, torch.Tensor]:
    queue = make_queue(window=window)
    queue.put(round_, version=3)
    found = queue.next()
    assert found is not None
    return found


def test_a_round_comes_out_as_it_went_in() -> None:
    """Every number and every bit of it, under the name of the server that it is of."""
    round_ = make_round(finished=True)
    message, bytes_ = sent(round_)
    read = unpack(message, bytes_, FORM, VOCAB, "me")
    (was,), (segment,) = round_.segments, read.segments
    assert (segment.request_id, segment.start, segment.temperature) == ("me/one", 7, 0.5)
    for name in ("tokens_R1", "features_RF", "teacher_RX"):
        assert torch.equal(getattr(segment, name), getattr(was, name)), name
    assert segment.features_RF is not None
    assert segment.features_RF.dtype == torch.bfloat16
    (own,), (block,) = round_.blocks, read.blocks
    assert torch.equal(block.path_K, own.path_K)
    assert torch.equal(block.teacher_KX, own.teacher_KX)
    assert (block.anchor, block.num_accepted, block.num_committed) == (7, 2, 3)
    assert read.finished == ("me/one",)
    for name in ("draft_seconds", "verify_seconds", "num_running", "tokens_left", "num_queued"):
        assert getattr(read, name) == getattr(round_, name), name
    assert message.version == 3


def test_of_a_long_prompt_the_rows_of_the_window_go() -> None:
    """A buffer keeps no more; the position of the first is moved by what was left out."""
    round_ = make_round(rows=12)
    message, bytes_ = sent(round_)
    (was,), (segment,) = round_.segments, unpack(message, bytes_, FORM, VOCAB, "me").segments
    assert segment.start == 7 + 4
    assert torch.equal(segment.tokens_R1, was.tokens_R1[4:])
    assert torch.equal(segment.teacher_RX, was.teacher_RX[4:])


def test_a_prompt_without_a_teacher_and_rows_without_features_go_as_they_are() -> None:
    """A prompt has no teacher rows where only logits teach, and some drafters want no features."""
    round_ = make_round()
    (segment,) = round_.segments
    bare = Segment("one", 7, segment.tokens_R1, None, None)
    message, bytes_ = sent(VerifyRound((bare,), (), (), 0.0, 0.0, 1))
    (read,) = unpack(message, bytes_, FORM, VOCAB, "me").segments
    assert read.features_RF is None
    assert read.teacher_RX is None
    assert torch.equal(read.tokens_R1, segment.tokens_R1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": 8}, "bytes of rows"),
        ({"segments": ()}, "bytes of rows"),
        ({"draft_seconds": float("inf")}, "no number"),
        ({"draft_seconds": float("nan")}, "no number"),
    ],
)
def test_rows_that_are_not_what_the_header_says_are_refused(
    change: dict[str, Any], word: str
) -> None:
    """A header is somebody's word; sizes are counted and compared before anything is looked at."""
    message, bytes_ = sent(make_round())
    with pytest.raises(FrameError, match=word):
        unpack(msgspec.structs.replace(message, **change), bytes_, FORM, VOCAB, "me")


def test_tokens_that_the_target_does_not_have_are_refused() -> None:
    """They would index outside of the embedding and take the trainer with them."""
    message, bytes_ = sent(make_round())
    with pytest.raises(FrameError, match="tokens"):
        unpack(message, bytes_, FORM, 3, "me")


def test_a_header_that_promises_a_lot_allocates_nothing() -> None:
    """Rows are views of what came: what did not come is not made, whatever is said of it."""
    message, bytes_ = sent(make_round())
    (head,) = message.segments
    huge = [msgspec.structs.replace(head, rows=1 << 20)] * 1000
    liar = msgspec.structs.replace(message, segments=tuple(huge), size=len(bytes_))
    tracemalloc.start()
    with pytest.raises(FrameError):
        unpack(liar, bytes_, FORM, VOCAB, "me")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["x" * 513, "x" * 100_000, "", "\ud800", "\u00e9" * 40])
def test_no_client_can_choose_a_name_that_no_message_holds(name: str) -> None:
    """Every round of such a request was refused, and none was sent any more after a few of them."""
    message, bytes_ = sent(make_round(name=name, finished=True))
    read, _ = codec(None).decode(codec(None).encode(message))
    (segment,) = (round_ := unpack(read, bytes_, FORM, VOCAB, "me")).segments
    assert round_.finished == (segment.request_id,) == (round_.blocks[0].request_id,)
    assert len(segment.request_id) <= len("me/") + 64


# --- frames -----------------------------------------------------------------------------------


def codec(key: bytes | None = KEY) -> Codec[Any]:
    return Codec(key, FromServer)


def test_who_has_the_key_is_heard() -> None:
    """Message and bytes behind it, the bytes being those of the frame."""
    payload = b"rows"
    message, read = codec().decode(
        codec().encode(Alive(version=3, checksum="a", received=3, to="you"), payload)
    )
    assert message == Alive(version=3, checksum="a", received=3, to="you")
    assert read is payload


@pytest.mark.parametrize(("sender", "receiver"), [(KEY, b"o" * 32), (None, KEY), (KEY, None)])
def test_who_has_another_key_or_none_is_not(sender: bytes | None, receiver: bytes | None) -> None:
    """Also where the receiver has none: two files that differ are a mistake to be seen."""
    frames = codec(sender).encode(Alive(version=3, checksum="a", received=3))
    with pytest.raises(FrameError, match="key"):
        codec(receiver).decode(frames)


def test_a_changed_byte_anywhere_is_refused() -> None:
    """Of head, header or what is behind it."""
    head, payload = codec().encode(Alive(version=3, checksum="a", received=3), b"rows")
    for frame, length in ((0, len(head)), (1, len(payload))):
        for place in range(length):
            frames = [bytearray(head), bytearray(payload)]
            frames[frame][place] ^= 1
            with pytest.raises(FrameError):
                codec().decode(frames)


def test_what_is_no_message_is_refused_whatever_it_is() -> None:
    """10,000 inputs, random or a message with some bytes changed, to a receiver without a key, whom no
    signature protects: a clear error each time, and no other. A changed byte may leave a message."""
    random_ = random.Random(1)
    plain = codec(None)
    message, bytes_ = sent(make_round())
    whole = plain.encode(message, bytes_.numpy().tobytes())
    heard = 0
    for number in range(10_000):
        if number % 2:
            frames = [
                random_.randbytes(random_.randrange(200)) for _ in range(random_.randrange(4))
            ]
            if frames:
                frames[0] = MAGIC + bytes(32) + frames[0]
        else:
            changed = bytearray(whole[0])
            for _ in range(random_.randrange(1, 4)):
                changed[random_.randrange(len(changed))] = random_.randrange(256)
            frames = [changed, whole[1]]
        try:
            read, payload = plain.decode(frames)
            if isinstance(read, Rounds):
                unpack(
                    read, torch.frombuffer(bytearray(payload), dtype=torch.uint8), FORM, VOCAB, "me"
                )
            heard += 1
        except FrameError:
            pass
    assert heard < 5_000


def test_a_header_beyond_its_limit_is_not_read() -> None:
    """MessagePack is decoded once it is known to be short."""
    head = MAGIC + bytes(32) + bytes(LONGEST_HEADER + 1)
    with pytest.raises(FrameError, match="no message"):
        codec(None).decode([head, b""])


def test_a_message_of_the_wrong_side_is_refused() -> None:
    """What a trainer says, sent back to it, is none of a server's."""
    frames = codec().encode(Version(version=1, parent=0, checksum="", as_loaded=True, parts=()))
    with pytest.raises(FrameError, match="not a message"):
        codec().decode(frames)
    assert Codec[Any](KEY, FromTrainer).decode(frames)


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    address = f"ipc://{tmp_path}/s"
    listens = listening(address, most_bytes=1 << 16)
    yield listens, address
    listens.close(linger=0)


def test_what_is_longer_than_any_message_never_arrives(
    sockets: tuple[zmq.Socket[bytes], str],
) -> None:
    """ZeroMQ ends the connection of who announces so many bytes, before it takes memory for them."""
    listens, address = sockets
    context = zmq.Context()
    for size, arrives in ((64 << 20, False), (1 << 10, True)):
        peer = context.socket(zmq.DEALER)
        peer.set(zmq.LINGER, 0)
        peer.connect(address)
        peer.send(bytes(size))
        assert bool(listens.poll(2000 if arrives else 500)) == arrives, size
        peer.close()
    context.term()


def test_an_address_has_one_trainer(sockets: tuple[zmq.Socket[bytes], str]) -> None:
    """ZeroMQ itself would take a socket's file away from who listens there."""
    with pytest.raises(ServerError, match=r"adapt.sidecar.address"):
        listening(sockets[1], 1 << 16)


def test_a_socket_file_is_its_users_alone(sockets: tuple[zmq.Socket[bytes], str]) -> None:
    """Without a key the file's mode is what keeps others out."""
    path = Path(sockets[1].removeprefix("ipc://"))
    assert path.stat().st_mode & 0o077 == 0


def test_a_socket_file_goes_with_its_trainer(sockets: tuple[zmq.Socket[bytes], str]) -> None:
    """ZeroMQ leaves it for good."""
    listens, address = sockets
    path = Path(address.removeprefix("ipc://"))
    assert path.is_socket()
    let_go(listens)
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "short", None])
def test_a_key_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    """The message says which key of the settings, and how to write one."""
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"adapt.sidecar.key_file"):
        read_key(path)


# --- weights ----------------------------------------------------------------------------------


def test_weights_come_out_as_they_went_in() -> None:
    """Names, types, and every bit."""
    weights = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7),
        "c": torch.randn(2, 2).half(),
    }
    parts, bytes_ = pack_weights(weights)
    read = unpack_weights(parts, bytes_, weights)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "known", [{"b": torch.zeros(4)}, {"a": torch.zeros(5)}, {"a": torch.zeros(4).half()}]
)
def test_weights_that_the_draft_has_not_are_refused(known: dict[str, torch.Tensor]) -> None:
    """Another name, shape or type: before anything is made of the bytes."""
    parts, bytes_ = pack_weights({"a": torch.zeros(4)})
    with pytest.raises(FrameError):
        unpack_weights(parts, bytes_, known)
    with pytest.raises(FrameError):
        unpack_weights(parts, bytes_[:-1], {"a": torch.zeros(4)})
    with pytest.raises(FrameError, match="twice"):
        unpack_weights((*parts, *parts), bytes_, {"a": torch.zeros(4)})
