"""Messages as frames: a head, which is checked before anything is made of it, and raw bytes behind it.

A head is eight bytes that say what this is and in which form, an HMAC-SHA256 (RFC 2104) under the shared
key of the header and of the SHA-256 of the bytes, and the header as MessagePack. Without a key there is
none, and peers are on this machine. A key proves who speaks; it hides nothing from who listens. What is too long for a receiver ZeroMQ refuses before it takes memory for it
(``ZMQ_MAXMSGSIZE``).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cosched.sidecar.messages import Message

MAGIC = b"cosched\x01"  # the last byte is the form
MAC = hashlib.sha256().digest_size
UNSIGNED = bytes(MAC)
LEAST_KEY = 16  # bytes
LONGEST_KEY = 4096
LONGEST_HEADER = 1 << 20  # bytes

M = TypeVar("M")
Bytes = bytes | bytearray | memoryview


class FrameError(ValueError):
    """What came is no message of ours, or not from somebody with the key; it is dropped and counted."""


def read_key(path: Path) -> bytes:
    """The shared key: the file's bytes, without white space around them.

    Raises:
        ConfigError: it cannot be read, or is too short to be one.
    """
    try:
        with path.open("rb") as file:
            key = file.read(LONGEST_KEY).strip()
    except OSError as error:
        raise ConfigError(
            f"adapt.sidecar.key_file: {path} cannot be read: {error.strerror}"
        ) from error
    if len(key) < LEAST_KEY:
        raise ConfigError(
            f"adapt.sidecar.key_file: {path} has {len(key)} bytes, and a key has at least {LEAST_KEY}; "
            f"write one with: openssl rand -hex 32 > {path}"
        )
    return key


class Codec(Generic[M]):
    """Writes messages, and reads those of one side: ``reads`` is their union."""

    def __init__(self, key: bytes | None, reads: Any) -> None:
        self._key = key
        self._decoder = msgspec.msgpack.Decoder(reads)

    def encode(
        self, message: Message, payload: Bytes = b"", digest: bytes | None = None
    ) -> list[Bytes]:
        """Its frames; ``payload`` is not copied. ``digest`` is what ``digest`` gave of it, if it did."""
        header = msgspec.msgpack.encode(message)
        mac = self._mac(header, self.digest(payload) if digest is None else digest)
        return [MAGIC + mac + header, payload]

    def digest(self, payload: Bytes) -> bytes:
        """What is signed of it: the same bytes may go to many."""
        return b"" if self._key is None else hashlib.sha256(payload).digest()

    def decode(self, frames: Sequence[Bytes]) -> tuple[M, Bytes]:
        """The message and the bytes behind it, which are those of the frame itself.

        Raises:
            FrameError: it is none, or not signed with the key.
        """
        if len(frames) != 2:
            raise FrameError(f"a message has two frames, not {len(frames)}")
        head, payload = frames
        start = len(MAGIC) + MAC
        if not start < len(head) <= start + LONGEST_HEADER or head[: len(MAGIC)] != MAGIC:
            raise FrameError("no message of this version of cosched")
        header = head[start:]
        signed = self._mac(header, self.digest(payload))
        if not hmac.compare_digest(signed, bytes(head[len(MAGIC) : start])):
            raise FrameError("not signed with the key that is used here")
        try:
            return self._decoder.decode(header), payload
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"not a message: {error}") from error

    def _mac(self, header: Bytes, digest: bytes) -> bytes:
        if self._key is None:
            return UNSIGNED
        return hmac.new(self._key, digest + header, hashlib.sha256).digest()
