"""Operators' requests while a server runs, over a socket that only its user can open.

A thread in rank 0's scheduler process takes them and queues them; the scheduler's own thread
carries them out between two rounds or when it idles, so nothing of the engine is touched from
outside. One line of JSON asks (a ``Command``), one line answers (a ``Reply``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import msgspec

from cosched.engines.sglang.worker.operator import Answer, Command, Status
from cosched.errors import NOT_DECODED, ControlError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 30.0  # seconds that a request waits for the scheduler to come round
SAVING = 600.0  # and for a checkpoint to be written
LONGEST = 1 << 16  # bytes of a request
SHOW_EVERY = 0.5  # seconds between two shown statuses
VERBS = ("status", "on", "off", "rollback", "save")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A status, or why there is none; ``late`` where the scheduler did not answer in time."""

    status: Status | None = None
    error: str | None = None
    late: bool = False


def seconds_for(verb: str) -> float:
    """How long who asks should wait: a little longer than who answers."""
    return PATIENCE + 5 + (SAVING if verb == "save" else 0)


def check(command: Command) -> None:
    """Refuse what no scheduler need be asked for.

    Raises:
        ControlError: the verb is unknown, or what it needs is missing or not allowed.
    """
    if command.verb not in VERBS:
        raise ControlError(f"{command.verb!r} is no command; there are {', '.join(VERBS)}")
    if command.verb == "rollback" and (command.version is None or command.version < 0):
        raise ControlError(f"rollback: version must be 0 or more, got {command.version}")
    if command.verb == "save":
        if command.path is None or not Path(command.path).is_absolute():
            raise ControlError(f"save: path must be absolute, got {command.path!r}")
        path = Path(command.path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ControlError(f"save: {path} exists and is not empty; name a new folder")


class SocketOperator:
    """The operator of rank 0's adaptation: whoever can open the socket.

    ``show`` gets a status now and then while rounds go on, and after every command; none is made that
    nobody would see.
    """

    def __init__(
        self,
        path: Path,
        show: Callable[[Status], None] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show = show
        self._patience = patience
        self._clock = clock
        self._queue: deque[tuple[Command, Answer]] = deque()
        self._unseen: Callable[[], Status] | None = None
        self._shown_at = float("-inf")
        mask = os.umask(0o177)  # the socket is made with mode 0600
        try:
            self._server = _Server(str(path), _Handler)
        finally:
            os.umask(mask)
        self._server.ask = self.ask
        threading.Thread(target=self._server.serve_forever, name="cosched", daemon=True).start()

    # --- the scheduler's thread ------------------------------------------------------------

    def asked(self) -> list[tuple[Command, Answer]]:
        if self._unseen is not None:
            self.show(self._unseen)
        commands: list[tuple[Command, Answer]] = []
        while self._queue:
            try:
                commands.append(self._queue.popleft())
            except IndexError:  # withdrawn just now
                break
        return commands

    def show(self, status: Callable[[], Status], at_once: bool = False) -> None:
        if self._show is None:
            return
        now = self._clock()
        if now < self._shown_at + SHOW_EVERY and not at_once:
            self._unseen = status
            return
        self._unseen, self._shown_at = None, now
        self._show(status())

    # --- threads of requests ---------------------------------------------------------------

    def ask(self, command: Command) -> Reply:
        """Queue a command and wait for its answer."""
        answered = threading.Event()
        answers: list[Status | str] = []

        def answer(result: Status | str) -> None:
            if isinstance(result, Status):
                self._unseen = lambda: result
            answers.append(result)
            answered.set()

        entry = (command, answer)
        self._queue.append(entry)
        if not answered.wait(self._patience):
            withdrawn = self._withdraw(entry)
            if withdrawn or command.verb != "save" or not answered.wait(SAVING):
                return self._late(command, withdrawn)
        result = answers[0]
        return Reply(error=result) if isinstance(result, str) else Reply(status=result)

    def _withdraw(self, entry: tuple[Command, Answer]) -> bool:
        """Whether the scheduler had not taken it yet."""
        try:
            self._queue.remove(entry)
        except ValueError:
            return False
        return True

    def _late(self, command: Command, withdrawn: bool) -> Reply:
        state = (
            "it was withdrawn; try again"
            if withdrawn
            else "it is under way: ask for the status to see when it is done"
        )
        return Reply(
            error=f"{command.verb}: no answer from the scheduler in {self._patience:g} s (a long "
            f"prefill, a paused engine?); {state}",
            late=True,
        )

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    ask: Callable[[Command], Reply]


class _Handler(socketserver.StreamRequestHandler):
    timeout: ClassVar[float | None] = 10.0  # seconds that a client may take to say what it wants

    def handle(self) -> None:
        try:
            line = self.rfile.readline(LONGEST)
        except TimeoutError:
            return
        reply = self._reply(line)
        with contextlib.suppress(OSError):  # who asked may have gone
            self.wfile.write(msgspec.json.encode(reply) + b"\n")

    def _reply(self, line: bytes) -> Reply:
        try:
            command = msgspec.json.decode(line, type=Command)
            check(command)
        except (*NOT_DECODED, ControlError) as error:
            return Reply(error=str(error))
        return cast("_Server", self.server).ask(command)


class Client:
    """Controls a running server of this user, on this machine, over the sockets of its replicas.

    All of them do what changes something; the first answers, and saves the draft, which they share.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    @property
    def replicas(self) -> int:
        return len(self._paths)

    def status(self) -> Status:
        """How the adaptation stands. All methods raise ``ControlError`` where they are refused."""
        return self.ask(Command(verb="status"))

    def on(self) -> Status:
        """Go on learning."""
        return self.ask(Command(verb="on"))

    def off(self) -> Status:
        """Serve the draft as it is."""
        return self.ask(Command(verb="off"))

    def rollback(self, version: int) -> Status:
        """Serve that version's weights again, as the next version."""
        return self.ask(Command(verb="rollback", version=version))

    def save(self, path: Path | str) -> Status:
        """Write the draft that serves as a checkpoint into a new folder."""
        return self.ask(Command(verb="save", path=str(Path(path).absolute())))

    def ask(self, command: Command) -> Status:
        """Any command.

        Raises:
            ControlError: it was refused, or nobody answers.
        """
        reply = self.reply(command)
        if reply.status is None:
            raise ControlError(reply.error or "no answer")
        return reply.status

    def reply(self, command: Command, replica: int = 0) -> Reply:
        """As ``ask``, with the refusal as a record; raises only where nobody answers.

        ``replica`` says whose status is wanted.
        """
        if command.verb in {"status", "save"}:
            return self._reply(self._paths[replica], command)
        with ThreadPoolExecutor(self.replicas) as pool:  # at once: each may be in a long prompt
            replies = list(pool.map(lambda path: self._reply(path, command), self._paths))
        return next((one for one in replies if one.status is None), replies[replica])

    @staticmethod
    def _reply(path: Path, command: Command) -> Reply:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(seconds_for(command.verb))
                connection.connect(str(path))
                connection.sendall(msgspec.json.encode(command) + b"\n")
                with connection.makefile("rb") as stream:
                    return msgspec.json.decode(stream.readline(), type=Reply)
        except (OSError, *NOT_DECODED) as error:
            raise ControlError(f"no server answers at {path}: {error}") from error
