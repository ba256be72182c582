"""What is refused before SGLang would fail of it: an address that is taken, and tokens that do not exist."""

from __future__ import annotations

import errno
import socket
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cosched.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_address(host: str, port: int) -> None:
    """Make sure that a server can listen there: SGLang finds out when its model is loaded.

    Raises:
        ServerError: it cannot.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with _socket(family, kind, protocol) as probe:
                if probe is None:
                    continue
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(address)
    except OSError as error:
        raise ServerError(
            f"--host {host} --port {port}: the server cannot listen there: "
            f"{error.strerror or error}; use another --port, or stop what has it"
        ) from error


def _socket(family: int, kind: int, protocol: int) -> AbstractContextManager[socket.socket | None]:
    """None for a family that this kernel has not, as IPv6 where only a file names it."""
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return nullcontext()


def check_tokens(manager: Any, _request: Any, input_ids: Sequence[int] | None) -> None:
    """Before SGLang's own check of a request; it looks such tokens up, and its scheduler dies of it.

    Raises:
        ValueError: there are some; SGLang answers that with its message and status 400.
    """
    size = manager.model_config.vocab_size
    if input_ids and not 0 <= min(input_ids) <= max(input_ids) < size:
        wrong = next(token for token in input_ids if not 0 <= token < size)
        raise ValueError(f"input_ids: there is no token {wrong}; the vocabulary has {size}")
