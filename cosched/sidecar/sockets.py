"""ZeroMQ's sockets of both sides, with the bounds that messages have before they are read."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import zmq

from cosched.errors import ServerError
from cosched.sidecar.wire import LONGEST_HEADER

IPC = "ipc://"
RECONNECT_MS = 100, 1000  # the first time and later ones


def listening(address: str, most_bytes: int) -> zmq.Socket[bytes]:
    """The trainer's. Where the address is a file, it is its user's alone.

    ``most_bytes`` are those behind the header of any message: ZeroMQ lets go of who sends more, before it
    takes memory for it.

    Raises:
        ServerError: the address is another's, or is none of this machine.
    """
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set(zmq.MAXMSGSIZE, most_bytes + 2 * LONGEST_HEADER)
    socket.set(zmq.LINGER, 0)
    mask = os.umask(0o177)
    try:
        if address.startswith(IPC):
            _lock(f"{address.removeprefix(IPC)}.lock")
        socket.bind(address)
    except OSError as error:  # ZeroMQ's are some of these
        socket.close()
        raise ServerError(
            f"adapt.sidecar.address: {address} cannot be had: {error.strerror or error}"
        ) from error
    finally:
        os.umask(mask)
    return socket


def let_go(socket: zmq.Socket[bytes]) -> None:
    """Close the trainer's. A file that it listened at goes too, which ZeroMQ leaves; the lock beside it stays."""
    address = socket.get_string(zmq.LAST_ENDPOINT)
    socket.close(linger=0)
    if address.startswith(IPC):
        Path(address.removeprefix(IPC)).unlink(missing_ok=True)


def connected(
    context: zmq.Context[zmq.Socket[bytes]], address: str, most_bytes: int, most_waiting: int
) -> zmq.Socket[bytes]:
    """A server's: it connects by and by, again and again, and nothing waits for who is not there."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, most_waiting)
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.MAXMSGSIZE, most_bytes + 2 * LONGEST_HEADER)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    socket.connect(address)
    return socket


def _lock(path: str) -> None:
    """ZeroMQ takes a file away from who listens there already, so another file says who does."""
    lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
    except OSError:
        os.close(lock)
        raise
