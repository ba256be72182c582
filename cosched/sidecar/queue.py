"""Rounds that wait to be sent: bounded, the oldest goes first, and who decodes never waits."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cosched.sidecar.messages import Rounds
from cosched.sidecar.rows import bounded
from cosched.sidecar.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cosched.records import VerifyRound
    from cosched.sidecar.messages import Memory
    from cosched.sidecar.rows import Packer

MOST_OWED = 4096  # requests that have ended in rounds that were dropped


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A round whose tensors lie in that slot."""

    rounds: Rounds
    slot: int


class RoundQueue:
    """Rounds in slots of memory: they wait, then they are sent, and a slot is free when that is answered.

    Where none is free the oldest round that was not sent goes, and is counted in ``dropped``; where all
    were sent, the new one.
    """

    def __init__(self, packer: Packer, num_slots: int, slot_bytes: int) -> None:
        self.dropped = 0
        self._packer = packer
        self._size = num_slots, slot_bytes
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._unanswered: deque[_Waiting] = deque()
        # The trainer lets go of others by itself, when it needs their room.
        self._owed: deque[str] = deque(maxlen=MOST_OWED)
        self._number = 0
        self._slots = Slots(secrets.token_hex(8), *self._size)
        self._free = list(range(num_slots))

    @property
    def memory(self) -> Memory:
        """Where the rows are; its name is new each time that all begins anew."""
        return self._slots.memory

    @property
    def num_unanswered(self) -> int:
        return len(self._unanswered)

    def begin_anew(self) -> None:
        """Nothing waits, and nothing was sent. A trainer that hangs may read the old memory yet."""
        slots = Slots(secrets.token_hex(8), *self._size)
        with self._lock:
            self.dropped += len(self._unanswered) + len(self._waiting)
            self._unanswered.clear()
            self._waiting.clear()
            self._owed.clear()  # whoever is told of a new server lets the old one's requests go
            self._slots, self._free, self._number = slots, list(range(self._size[0])), 0

    def put(self, round_: VerifyRound, version: int) -> None:
        """Copy a round that ``version`` served, if there is room for it.

        A prefill of several prompts that no slot holds goes as one of each.
        """
        for one in self._of_a_slot(round_):
            self._put(one, version)

    def _of_a_slot(self, round_: VerifyRound) -> Iterable[VerifyRound]:
        if round_.blocks or len(round_.segments) < 2:
            return (round_,)
        if self._packer.heads(round_)[2] <= self._slots.memory.slot_bytes:
            return (round_,)
        *others, last = round_.segments
        none = replace(round_, finished=(), draft_seconds=0.0, verify_seconds=0.0)
        return (
            *(replace(none, segments=(segment,)) for segment in others),
            replace(round_, segments=(last,)),
        )

    def _put(self, round_: VerifyRound, version: int) -> None:
        segments, blocks, size = self._packer.heads(round_)
        ended = tuple(map(bounded, round_.finished))
        with self._lock:
            slots, slot = self._slots, self._slot_for(size)
            if slot is None:
                self.dropped += 1
                self._owed += ended
                return
        self._packer.pack(round_, segments, blocks, slots.tensors[slot][:size])
        with self._lock:
            if slots is not self._slots:  # all has begun anew meanwhile
                self.dropped += 1
                return
            finished = (*self._owed, *ended)
            self._owed.clear()
            self._number += 1
            rounds = Rounds(
                number=self._number,
                version=version,
                slot=slot,
                size=size,
                segments=segments,
                blocks=blocks,
                finished=finished,
                draft_seconds=round_.draft_seconds,
                verify_seconds=round_.verify_seconds,
                num_running=round_.num_running,
                tokens_left=round_.tokens_left,
                num_queued=round_.num_queued,
                dropped=self.dropped,
                plain_share=round_.plain_share,
            )
            self._waiting.append(_Waiting(rounds, slot))

    def _slot_for(self, size: int) -> int | None:
        """A free one, or that of the oldest round that was not sent; the lock is held."""
        if size > self._slots.memory.slot_bytes:
            return None
        if self._free:
            return self._free.pop()
        if not self._waiting:
            return None  # the trainer has all of them
        oldest = self._waiting.popleft()
        self.dropped += 1
        self._owed += oldest.rounds.finished
        return oldest.slot

    def next(self) -> tuple[Rounds, Tensor] | None:
        """The oldest round that waits, to be sent now, and its bytes; None where there is none."""
        with self._lock:
            if not self._waiting:
                return None
            one = self._waiting.popleft()
            self._unanswered.append(one)
            return one.rounds, self._slots.tensors[one.slot][: one.rounds.size]

    def answered(self, number: int) -> bool:
        """Nobody needs the tensors of that round and of those before it; whether there were any."""
        with self._lock:
            before = len(self._unanswered)
            while self._unanswered and self._unanswered[0].rounds.number <= number:
                self._free.append(self._unanswered.popleft().slot)
            return len(self._unanswered) < before
