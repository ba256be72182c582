"""The trainer's side: rounds of all servers go to one co-scheduler, and its versions to all servers."""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import zmq

from cosched.errors import CoschedError
from cosched.loop.warning import StandingWarning
from cosched.records import IDLE_TICK
from cosched.sidecar.link import as_tensor
from cosched.sidecar.messages import (
    Alive,
    Ask,
    Bye,
    FromServer,
    Hello,
    Refused,
    RollBack,
    Rounds,
    Served,
    Taken,
    Unknown,
    Welcome,
)
from cosched.sidecar.rows import unpack
from cosched.sidecar.servers import Server, TrainerStatus, statuses
from cosched.sidecar.slots import mapped
from cosched.sidecar.sockets import let_go
from cosched.sidecar.weights import unpack_weights
from cosched.sidecar.wire import Codec, FrameError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from cosched.records import VerifyRound
    from cosched.sidecar.learning import Learning
    from cosched.sidecar.messages import Message
    from cosched.sidecar.wire import Bytes

    OnRound = Callable[[VerifyRound, int], None]

logger = logging.getLogger("cosched")

TICK_S = 0.1  # between two looks at what goes on beside, where no server says anything
SOON_S = 0.002  # the same while an update is under way
SHOWN_EVERY_S = 1.0
SETTLING_S = 2.0  # that an ending trainer waits for an update that is under way
MOST_AT_ONCE = 256  # messages, before something else is looked after
MOST_SERVERS = 4096
LONGEST_REASON = 2000  # letters
SAID = 8  # refused messages that the log has a line for


@dataclass(frozen=True, slots=True)
class Limits:
    """Shared memory of one server at most, how long it may say nothing, and what rows may be."""

    memory_bytes: int
    limit_s: float
    vocab_size: int
    device: torch.device


class Service:
    """Takes in what servers send, one message after the other, and has ``learning`` go on with it.

    Servers are told its newest version; ``agree`` says of a server why it does not go with this trainer, or
    nothing. What is no message, or is not signed, is dropped and counted before anything is made of it.
    ``on_round`` is told of each round and of the version that drafted it.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        codec: Codec[FromServer],
        learning: Learning,
        agree: Callable[[Hello], str | None],
        limits: Limits,
        show: Callable[[TrainerStatus], None] = lambda _status: None,
        clock: Callable[[], float] = time.monotonic,
        on_round: OnRound | None = None,
    ) -> None:
        self.refused = 0
        self._socket = socket
        self._codec = codec
        self._learning = learning
        self._coscheduler = learning.coscheduler
        self._versions = learning.versions
        self._agree = agree
        self._limits = limits
        self._show = show
        self._clock = clock
        self._on_round = on_round
        self._shown_at = 0.0
        self._warning = StandingWarning(learning.coscheduler.sink)
        self._name = secrets.token_hex(8)
        self._servers: dict[bytes, Server] = {}

    def run(self, ends: Callable[[], bool]) -> None:
        """Until ``ends`` says so, or learning cannot go on; what is learnt then is saved."""
        try:
            while not ends():
                self.turn()
            until = self._clock() + SETTLING_S
            while self._coscheduler.busy and self._clock() < until:
                self.turn()
        finally:
            let_go(self._socket)
            self._learning.end(trains=not self._coscheduler.busy)

    def turn(self) -> None:
        """Wait a while for messages, take in those that are there, and look after what goes on."""
        told = False
        wait_s = SOON_S if self._coscheduler.busy else TICK_S
        if self._socket.poll(int(wait_s * 1000)):
            with suppress(zmq.Again):
                for _ in range(MOST_AT_ONCE):
                    told |= self._receive()
        if not told:
            self._tell(IDLE_TICK)
        for identity, server in list(self._servers.items()):
            if self._clock() - server.heard_at > self._limits.limit_s:
                self._let_go(identity, "says nothing any more")
        if self._learning.due():
            self._learning.save()
        if self._clock() - self._shown_at >= SHOWN_EVERY_S:
            self._shown_at = self._clock()
            self._warning.becomes(self._learning.trouble)
            self._show(self.status())

    def status(self) -> TrainerStatus:
        """How it stands now."""
        counters, lineage = self._coscheduler.counters, self._versions.lineage
        return TrainerStatus(
            version=lineage.version,
            parent=lineage.parent,
            checksum=lineage.checksum,
            rounds=counters.rounds,
            updates=counters.updates,
            recent_acceptance_length=counters.recent,
            refused_updates=counters.refused,
            rollbacks=counters.rolled_back,
            refused_messages=self.refused,
            warning=self._warning.text,
            servers=statuses(self._servers.values()),
        )

    # --- what comes ------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Take in one message; whether a round was in it.

        Raises:
            zmq.Again: there is none.
        """
        identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            message, payload = self._codec.decode([frame.buffer for frame in frames])
            return self._take(identity.bytes, message, payload)
        except FrameError as error:
            self.refused += 1
            if self.refused <= SAID:
                logger.warning("cosched refuses a message: %s", error)
        return False

    def _take(self, identity: bytes, message: FromServer, payload: Bytes) -> bool:
        if isinstance(message, Hello):
            self._meet(identity, message)
            return False
        server = self._servers.get(identity)
        if server is None:
            self._send(identity, Unknown())
            return False
        if message.to != self._name:
            raise FrameError("meant for somebody else")
        server.heard_at = self._clock()
        match message:
            case Rounds():
                self._learn(identity, server, message, payload)
                return True
            case Alive():
                server.version, server.received = message.version, message.received
                self._answer(identity, server)
            case Served():
                self._go_on_from(identity, server, message, payload)
            case RollBack():
                self._roll_back(message.version)
            case Bye():
                self._let_go(identity, "has ended")
        return False

    def _meet(self, identity: bytes, hello: Hello) -> None:
        """A server says hello, for the first time or because it has heard nothing."""
        known, reason = self._servers.get(identity), self._agree(hello)
        if known is None and len(self._servers) >= MOST_SERVERS:
            reason = f"there are {MOST_SERVERS} servers already"
        if reason is not None:
            logger.warning("cosched refuses a server: %s", reason[:LONGEST_REASON])
            self._send(identity, Refused(to=hello.server, reason=reason[:LONGEST_REASON]))
            return
        if known is None or known.name != hello.server:
            if known is not None:
                self._let_go(identity, "has begun anew")
            slots = None
            if hello.memory is not None:
                slots = mapped(hello.memory, self._limits.memory_bytes)
            known = Server(hello, slots, self._clock(), hello.version, hello.version)
            self._servers[identity] = known
            logger.info(
                "cosched trains for server %s, which serves version %d", known.name, known.version
            )
        known.heard_at = self._clock()
        self._send(
            identity, Welcome(to=known.name, trainer=self._name, shared=known.slots is not None)
        )
        self._compare(identity, known)

    def _learn(self, identity: bytes, server: Server, message: Rounds, payload: Bytes) -> None:
        if message.number <= server.number:
            raise FrameError("a round that was there before")
        server.number = message.number
        round_ = unpack(
            message,
            self._bytes_of(server, message, payload),
            server.hello.form,
            self._limits.vocab_size,
            server.name,
            self._limits.device,
        )
        server.note(message, round_)
        if self._on_round:
            self._on_round(round_, message.version)
        self._tell(replace(round_, served_loaded=self._versions.is_loaded(message.version)))
        self._answer(identity, server)

    def _answer(self, identity: bytes, server: Server) -> None:
        counters, version = self._coscheduler.counters, self._versions.lineage.version
        self._send(
            identity,
            Taken(
                to=server.name,
                number=server.number,
                version=version,
                updates=counters.updates,
                skipped_steps=counters.skipped_steps,
                loss=counters.losses[-1] if counters.losses else None,
                kept=self._versions.kept,
            ),
        )
        late = self._clock() - server.sent_at > self._limits.limit_s
        if max(server.version, server.received) < version and late:
            self._send_newest(identity, server)  # it has been lost

    def _bytes_of(self, server: Server, message: Rounds, payload: Bytes) -> Tensor:
        if message.slot is None:
            return as_tensor(payload)
        slots = server.slots
        if slots is None or message.slot >= len(slots) or message.size > len(slots[0]):
            raise FrameError("rows in memory that is not shared")
        return slots[message.slot][: message.size]

    def _tell(self, round_: VerifyRound) -> None:
        """Let the co-scheduler have a round, with what runs on all servers, and pass on what comes of it."""
        servers = self._servers.values()
        left = [one.tokens_left for one in servers if one.tokens_left is not None]
        self._learning.on_round(
            replace(
                round_,
                num_running=sum(one.num_running for one in servers),
                tokens_left=sum(left) if left else None,
                num_queued=sum(one.num_queued for one in servers),
            )
        )
        self._announce()

    def _roll_back(self, version: int) -> None:
        try:
            self._learning.roll_back(version)
        except CoschedError as error:
            logger.warning("cosched: rollback to %d: %s", version, error)
        self._announce()

    def _let_go(self, identity: bytes, why: str) -> None:
        """A server is no more; its requests go on nowhere."""
        server = self._servers.pop(identity)
        logger.info("cosched: server %s %s", server.name, why)
        if server.requests:
            self._tell(replace(IDLE_TICK, finished=tuple(sorted(server.requests))))

    # --- versions --------------------------------------------------------------------------

    def _announce(self) -> None:
        """Send the newest version to all, if it is new."""
        if (new := self._versions.renewed()) is None:
            return
        message, servers = new.message, self._servers
        text = "cosched: version %d, from %d, goes to %d servers"
        logger.info(text, message.version, message.parent, len(servers))
        for identity, server in servers.items():
            self._send_newest(identity, server)

    def _send_newest(self, identity: bytes, server: Server) -> None:
        if (newest := self._versions.newest) is not None:
            server.sent_at = self._clock()
            message = msgspec.structs.replace(newest.message, to=server.name)
            self._send(identity, message, newest.payload, newest.digest)

    def _compare(self, identity: bytes, server: Server) -> None:
        """What serves there with what should: who knows more of it goes on."""
        hello, own = server.hello, self._versions.lineage
        if hello.version < own.version:
            self._send_newest(identity, server)
        elif hello.version > own.version and not self._coscheduler.counters.updates:
            if hello.as_loaded:
                self._learning.serve_as(hello.version, of=0)
            else:
                server.asked = True
                self._send(identity, Ask(to=server.name))
        elif (hello.version, hello.checksum) != (own.version, own.checksum):
            # That version is not from here, so what serves here becomes the one after it.
            self._learning.serve_as(hello.version + 1, of=own.version)
        self._announce()

    def _go_on_from(self, identity: bytes, server: Server, message: Served, payload: Bytes) -> None:
        """A trainer that has learnt nothing yet takes up what serves: there was one before it."""
        if not server.asked:
            raise FrameError("weights that nobody asked for")
        server.asked = False
        weights = unpack_weights(message.parts, as_tensor(payload), self._versions.known)
        counters, trainer = self._coscheduler.counters, self._coscheduler.trainer
        assert trainer is not None, "a side-car without one is refused when it is built"
        if counters.updates or message.version <= self._versions.lineage.version:
            return self._compare(identity, server)
        if weights.keys() != trainer.weights().keys():
            raise FrameError("weights of other parameters than are trained")
        if self._learning.take_up(weights, message.version, server.hello.checksum):
            logger.info("cosched goes on from version %d of %s", message.version, server.name)
        else:
            logger.warning("cosched: %s sent other weights than serve there", server.name)
        return self._announce()

    def _send(
        self, identity: bytes, message: Message, payload: Bytes = b"", digest: bytes | None = None
    ) -> None:
        frames = self._codec.encode(message, payload, digest)
        with suppress(zmq.Again, zmq.ZMQError):  # it is gone, or takes nothing: its silence tells
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=False)
