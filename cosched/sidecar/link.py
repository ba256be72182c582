"""A server's side of the wire: a thread that sends rounds and takes versions in. Nobody waits for it.

Rounds wait in a queue of bounded memory. The trainer has so many unanswered messages at most (``CREDIT``), so that a slow one
finds rounds which are new.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import torch
import zmq

from cosched.sidecar.messages import (
    Alive,
    Ask,
    Bye,
    FromTrainer,
    Hello,
    Message,
    Refused,
    RollBack,
    Served,
    Taken,
    Unknown,
    Version,
    Welcome,
)
from cosched.sidecar.sockets import connected
from cosched.sidecar.versions import Arrival, Serving
from cosched.sidecar.weights import bytes_of, pack_weights, unpack_weights
from cosched.sidecar.wire import Codec, FrameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.records import VerifyRound
    from cosched.sidecar.queue import RoundQueue
    from cosched.sidecar.wire import Bytes

logger = logging.getLogger("cosched")

CREDIT = 8  # messages that the trainer has not answered yet, at most
BEAT_S = 0.5  # between two signs of life
CLOSING_S = 1.0


class Link:
    """Between the decoding of a server and its trainer, which may be away, slow, or another than it was.

    ``hello`` is what the server says of itself; what changes from time to time is put in. ``known`` are
    the draft's tensors as they serve, by which what comes is checked. A trainer that says nothing for
    ``limit_s`` is taken for lost; what it had not answered is let go, so that nothing is trained on twice.
    """

    def __init__(
        self,
        address: str,
        key: bytes | None,
        hello: Hello,
        queue: RoundQueue,
        known: Mapping[str, Tensor],
        serving: Serving,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0  # messages that were none
        self.taken: Taken | None = None  # how training goes, as the trainer said last
        self.received = 0  # the newest version that has come whole
        self._address = address
        self._hello = hello
        self._queue = queue
        self._known = known
        self._serving = serving
        self._limit_s = limit_s
        self._clock = clock
        self._codec: Codec[FromTrainer] = Codec(key, FromTrainer)
        self._lock = threading.Lock()
        self._asked: deque[Message] = deque()
        self._arrival: Arrival | None = None
        self._refusal: str | None = None
        self._broken: str | None = None
        self._heard_at, self._said_at = clock(), -math.inf
        self._moved_at = clock()  # since then no round that was sent has been answered
        self._alive_at = -math.inf
        self._greets_anew = False
        self._trainer = ""  # as it calls itself; "": not known yet
        self._shared = False  # whether it sees the queue's memory
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = threading.Event()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connected(context, address, bytes_of(known), 2 * CREDIT)
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._stop), name="cosched-link", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._stop, self._wake, self._thread, context)
        self._thread.start()

    # --- what decoding calls ---------------------------------------------------------------

    def offer(self, round_: VerifyRound, version: int) -> None:
        """Have a round sent, if there is room for it; its tensors may be written to afterwards."""
        self._queue.put(round_, version)
        self._rouse()

    @property
    def dropped(self) -> int:
        """Rounds for which there was no room, or no trainer that took them."""
        return self._queue.dropped

    def arrived(self) -> Arrival | None:
        """The newest version that has come since this was asked last."""
        if self._arrival is None:
            return None
        with self._lock:
            arrival, self._arrival = self._arrival, None
        return arrival

    def now_serves(self, serving: Serving) -> None:
        """Say so with the next sign of life; what has come and is older is let go."""
        with self._lock:
            self._serving = serving
            if self._arrival is not None and self._arrival.version.version <= serving.version:
                self._arrival = None

    def greet_anew(self) -> None:
        """Have the trainer compare what serves with what should, as if this server came just now."""
        self._greets_anew = True
        self._rouse()

    @property
    def there(self) -> bool:
        """Whether a trainer knows this server, as far as is known."""
        return bool(self._trainer) and self._broken is None

    def ask_for(self, version: int) -> None:
        """Have the trainer that is there go back to a version, on all servers; no other is asked."""
        with self._lock:
            self._asked.append(RollBack(version=version))
        self._rouse()

    @property
    def trouble(self) -> str | None:
        """Why nothing is learnt of what is served, in words for an operator; the same while it lasts."""
        if self._broken is not None:
            return f"the link to the trainer has ended: {self._broken}"
        if self._refusal is not None:
            return f"the trainer refuses this server: {self._refusal}"
        if self._trainer:
            return None
        return f"no trainer at {self._address} is heard"

    @property
    def lost(self) -> bool:
        """Whether it is worth a word: a start takes a while."""
        away = not self._trainer and self._clock() - self._heard_at > self._limit_s
        return away or self._refusal is not None or self._broken is not None

    def close(self) -> None:
        """End it; nothing is sent any more."""
        self._end()

    # --- the thread ------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """As if nothing had been said; what that trainer was to do, and made, is of no other."""
        with self._lock:
            self._asked.clear()
            self._arrival, self.received = None, self._serving.version
        self._queue.begin_anew()
        self._trainer, self._shared, self._said_at = "", False, -math.inf

    def _rouse(self) -> None:
        with suppress(BlockingIOError):  # it will come
            os.eventfd_write(self._wake, 1)

    def _turn(self) -> None:
        """Wait for a while, take in what has come, and send what can be sent."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        ready = dict(poller.poll(int(BEAT_S * 1000)))
        if self._wake in ready:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while (message := self._received()) is not None:
            try:
                self._take(*message)
            except FrameError:
                self.refused += 1
        now = self._clock()
        anew, self._greets_anew = self._greets_anew, False
        if anew or (self._trainer and self._overdue(now)):
            self._begin_anew()
        if not self._trainer:
            if now - self._said_at >= (BEAT_S if self._refusal is None else self._limit_s):
                self._say_hello()
            return
        while (asked := self._next_asked()) is not None:
            self._send(asked)
        while self._queue.num_unanswered < CREDIT and self._send_oldest():
            pass
        if now - self._alive_at >= BEAT_S:
            self._alive_at = now
            serving, received = self._serving, self.received
            self._send(Alive(version=serving.version, checksum=serving.checksum, received=received))

    def _overdue(self, now: float) -> bool:
        """Whether the trainer says nothing, or answers and takes none of what it was sent."""
        takes_none = self._queue.num_unanswered > 0 and now - self._moved_at > self._limit_s
        if takes_none:
            logger.warning("cosched: the trainer takes no rounds of this server; it is met anew")
        return takes_none or now - self._heard_at > self._limit_s

    def _next_asked(self) -> Message | None:
        with self._lock:
            return self._asked.popleft() if self._asked else None

    def _received(self) -> tuple[FromTrainer, Bytes] | None:
        """The next message; those that are none are passed over."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            try:
                return self._codec.decode([frame.buffer for frame in frames])
            except FrameError:
                self.refused += 1

    def _take(self, message: FromTrainer, payload: Bytes) -> None:
        if isinstance(message, Unknown):
            if self._trainer:
                self._begin_anew()
            return
        if message.to != self._queue.memory.name:
            self.refused += 1
            return
        self._heard_at = self._clock()
        match message:
            case Welcome():
                self._trainer, self._shared, self._refusal = message.trainer, message.shared, None
            case Refused():
                self._refusal = message.reason
            case Taken():
                self.taken = message
                if self._queue.answered(message.number):
                    self._moved_at = self._heard_at
            case Version():
                self._keep(message, payload)
            case Ask():
                serving = self._serving
                parts, bytes_ = pack_weights(serving.weights())
                self._send(Served(version=serving.version, parts=parts), bytes_.numpy().data)

    def _keep(self, message: Version, payload: Bytes) -> None:
        """The newest version waits until decoding asks."""
        weights = None
        if not message.as_loaded:
            weights = unpack_weights(message.parts, as_tensor(payload), self._known)
        self.received = message.version
        with self._lock:
            waiting = self._arrival.version.version if self._arrival else 0
            if message.version > max(waiting, self._serving.version):
                self._arrival = Arrival(message, weights)

    def _say_hello(self) -> None:
        serving, memory = self._serving, self._queue.memory
        self._send(
            msgspec.structs.replace(
                self._hello,
                server=memory.name,
                version=serving.version,
                checksum=serving.checksum,
                as_loaded=serving.as_loaded,
                memory=memory,
            )
        )

    def _send_oldest(self) -> bool:
        """The oldest round that waits; whether there was one."""
        if (found := self._queue.next()) is None:
            return False
        if self._queue.num_unanswered == 1:
            self._moved_at = self._clock()
        rounds, bytes_ = found
        if self._shared:
            self._send(rounds)
        else:
            self._send(msgspec.structs.replace(rounds, slot=None), bytes_.numpy().data)
        return True

    def _send(self, message: Message, payload: Bytes = b"") -> None:
        frames = self._codec.encode(msgspec.structs.replace(message, to=self._trainer), payload)
        self._said_at = self._clock()
        with suppress(zmq.Again):  # a trainer that takes nothing is noticed by its silence
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def turn(self) -> bool:
        """What the thread does again and again; whether it goes on."""
        try:
            self._turn()
        except Exception as error:
            logger.exception("cosched learns no more of what is served here")
            self._broken = f"{type(error).__name__}: {error}"
        return self._broken is None

    def say_goodbye(self) -> None:
        """Tell a trainer that is there; the last that the thread does."""
        if self._trainer and self._broken is None:
            self._send(Bye())


def as_tensor(bytes_: Bytes) -> Tensor:
    """The bytes of a frame, not copied ``[B]``."""
    return torch.frombuffer(bytes_, dtype=torch.uint8) if len(bytes_) else torch.empty(0).byte()


def _run(link_of: weakref.ref[Link], stop: threading.Event) -> None:
    goes_on = True
    while goes_on and not stop.is_set() and (link := link_of()) is not None:
        goes_on = link.turn()
        del link  # who else has it may let it go
    if (link := link_of()) is not None:
        link.say_goodbye()


def _end(stop: threading.Event, wake: int, thread: threading.Thread, context: zmq.Context) -> None:
    stop.set()
    os.eventfd_write(wake, 1)
    if thread is not threading.current_thread():
        thread.join(CLOSING_S)
    context.destroy(linger=int(CLOSING_S * 100))
    os.close(wake)
