"""Servers, a queue on each, a link and one trainer, round after round: numbers only, seeded.

Time goes on by what a round takes. All servers are alike and busy: so many requests at once on each, a new
one for each that ends. A round's rows wait in the server's queue, of which the oldest go where it is full;
the trainer takes rounds in as fast as it can and the link lets it, from all queues alike. As soon as the cadence
says so and nothing else is under way it makes an update; versions go out one after the other, the newest
first, and serve when they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosched.plan.behaviour import Acceptance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosched.plan.behaviour import Behaviour

SIMULATED = 64  # servers; of more, each stands for several that are alike
LATE = 0.2  # the last part of the time, in which the end is looked at


@dataclass(frozen=True, slots=True)
class Scene:
    """Costs in seconds and bytes. ``elsewhere``: one trainer for all, else each server learns by itself.

    ``cadence`` is how many rounds, or tokens where ``by_tokens``, lie between two updates; 0: nothing is
    learnt. Each ``updates_per_version``-th update is published, the first ``first_version`` the earliest. ``exposed``
    is what decoding waits for an update of its own server's, ``handover`` for a round that it hands over.
    ``per_request``: what was learnt is forgotten when the request ends.
    """

    servers: int
    requests: int
    seconds: float
    round_seconds: float
    prefill: float = 0.0
    elsewhere: bool = True
    per_request: bool = False
    cadence: float = 0.0
    by_tokens: bool = False
    update: float = 0.0
    updates_per_version: float = 1.0
    first_version: int = 1
    exposed: float = 0.0
    handover: float = 0.0
    publish: float = 0.0
    intake: float = 0.0
    link_in: float = np.inf
    link_out: float = np.inf
    queue_rounds: int = 64
    round_bytes: float = 0.0
    row_bytes: float = 0.0
    prompt_rows: int = 0
    version_bytes: float = 0.0


@dataclass(slots=True)
class Outcome:
    """Sums over all servers and the whole time. Rows that were ``sent`` are taken, dropped or ``waiting``."""

    seconds: float = 0.0
    tokens: float = 0.0
    committed: float = 0.0
    request_rounds: float = 0.0
    rounds: float = 0.0
    late_committed: float = 0.0
    late_rounds: float = 0.0
    exposed: float = 0.0
    serving: float = 0.0
    sent: float = 0.0
    taken: float = 0.0
    dropped: float = 0.0
    waiting: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    updates: int = 0
    versions: int = 0
    busy: float = 0.0

    @property
    def tau(self) -> float:
        return self.committed / max(1.0, self.request_rounds)

    @property
    def late_tau(self) -> float:
        return self.late_committed / max(1.0, self.late_rounds)


def simulate(scene: Scene, behaviour: Behaviour, seed: int) -> Outcome:
    """One course of it."""
    return _Course(scene, behaviour, np.random.default_rng(seed)).run()


class _Course:
    def __init__(self, scene: Scene, behaviour: Behaviour, random: np.random.Generator) -> None:
        alone = 1 if not scene.elsewhere else SIMULATED
        self._scene, self._behaviour, self._random = scene, behaviour, random
        self._servers = min(scene.servers, alone)
        self._weight = scene.servers / self._servers
        self._acceptance = Acceptance(behaviour.most_tokens)
        shape = (self._servers, scene.requests)
        # At a moment of no special kind long answers are met more often, each anywhere in it.
        chances = behaviour.lengths / behaviour.lengths.sum()
        self._length = random.choice(behaviour.lengths, shape, p=chances)
        self._position = 1 + (random.random(shape) * (self._length - 1)).astype(np.int64)
        self._since = np.zeros(shape)  # updates in what served when a request began
        self._clock = random.random(self._servers) * scene.round_seconds
        self._queue = np.zeros((2, self._servers))  # rounds, rows
        self._out = Outcome()
        self._due = 0.0  # rounds or tokens since the last update began
        self._free_at = 0.0
        self._runs = False
        self._done = 0  # updates
        self._ready = self._sending = self._served = 0  # updates in a version
        self._out_free_at = 0.0
        self._next_version = float(max(1, scene.first_version))
        self._messages = 0.0

    def run(self) -> Outcome:
        scene, now = self._scene, 0.0
        while now < scene.seconds:
            now += scene.round_seconds
            active = np.flatnonzero(self._clock <= now)
            late = now > (1 - LATE) * scene.seconds
            counted = self._serve(active, late)
            if scene.cadence:
                got = self._take_in() if scene.elsewhere else counted
                self._train(now, got)
                self._send(now)
        out = self._out
        out.seconds, out.waiting = now, float(self._queue[1].sum())
        out.serving = now * self._servers
        for name in ("tokens", "committed", "request_rounds", "rounds", "late_committed", "late_rounds",
                     "exposed", "serving", "sent", "taken", "dropped", "waiting", "bytes_in", "bytes_out",
                     ):  # fmt: skip
            setattr(out, name, getattr(out, name) * self._weight)
        return out

    def _serve(self, active: NDArray[np.int64], late: bool) -> tuple[float, float]:
        """A round of those servers: how many rounds and tokens that were."""
        scene, out = self._scene, self._out
        position, length = self._position[active], self._length[active]
        learnt = self._served - self._since[active]
        tau = self._behaviour.tau(position, learnt)
        left = length - position
        committed = np.minimum(self._acceptance.draw(tau, self._random), np.maximum(left, 1))
        position += committed
        ended = position >= length
        began = ended.sum(axis=1)
        number = int(began.sum())
        position[ended] = 1
        length[ended] = self._random.choice(self._behaviour.lengths, number)
        self._position[active], self._length[active] = position, length
        if scene.per_request and number:
            since = self._since[active]
            since[ended] = self._served
            self._since[active] = since
        spent = scene.round_seconds + began * scene.prefill
        if scene.cadence and scene.elsewhere:
            rows = committed.sum(axis=1) + began * scene.prompt_rows
            self._hand_over(active, 1.0 + began, rows)
            spent = spent + scene.handover * (1.0 + began)
            out.exposed += float((scene.handover * (1.0 + began)).sum())
        self._clock[active] += spent
        total = float(committed.sum())
        out.rounds += len(active)
        out.request_rounds += committed.size
        out.committed += total
        out.tokens += total + number
        if late:
            out.late_rounds += committed.size
            out.late_committed += total
        return float(len(active)), total

    def _hand_over(
        self, active: NDArray[np.int64], rounds: NDArray[np.float64], rows: NDArray[np.float64]
    ) -> None:
        """Into the queues; the oldest go, and are as large as others."""
        self._messages += float(rounds.sum())
        self._queue[0, active] += rounds
        self._queue[1, active] += rows
        self._out.sent += float(rows.sum())
        over = np.maximum(self._queue[0] - self._scene.queue_rounds, 0.0)
        share = over / np.maximum(self._queue[0], 1e-12)
        self._out.dropped += float((self._queue[1] * share).sum())
        self._queue *= 1.0 - share

    def _take_in(self) -> tuple[float, float]:
        """What the trainer gets of all that waits while a round goes on: rounds and tokens."""
        scene, out = self._scene, self._out
        waiting, rows = (float(one.sum()) * self._weight for one in self._queue)
        if waiting <= 0:
            return 0.0, 0.0
        bytes_ = (scene.round_bytes * waiting + scene.row_bytes * rows) / waiting
        longest = max(scene.intake, bytes_ / scene.link_in)
        most = scene.round_seconds / longest if longest > 0 else np.inf
        share = min(1.0, most / waiting)
        out.taken += rows * share / self._weight
        out.bytes_in += bytes_ * waiting * share / self._weight
        self._queue *= 1.0 - share
        # Prompts are handed over too, and are neither rounds nor tokens to a cadence.
        of_rounds, of_tokens = out.rounds / self._messages, out.committed / out.sent
        return waiting * share * of_rounds, rows * share * of_tokens

    def _train(self, now: float, got: tuple[float, float]) -> None:
        """Updates that begin and end until now, by the cadence and one after the other."""
        scene, out = self._scene, self._out
        new = got[1] if scene.by_tokens else got[0]
        rate = new / scene.round_seconds
        self._due += new
        while True:
            if self._runs and self._free_at <= now:
                self._runs = False
                self._done += 1
                out.updates += 1
                self._publish()
            if self._runs or self._due < scene.cadence or rate <= 0:
                return
            begins = max(self._free_at, now - (self._due - scene.cadence) / rate)
            if begins > now:
                return
            self._due = rate * (now - begins)
            self._runs, self._free_at = True, begins + scene.update
            out.busy += scene.update
            if not scene.elsewhere:
                self._clock += scene.exposed
                out.exposed += scene.exposed

    def _publish(self) -> None:
        """What has been learnt may serve."""
        if self._done >= self._next_version:
            self._ready = self._done
            self._next_version = max(
                self._next_version + self._scene.updates_per_version, self._done + 1e-9
            )

    def _send(self, now: float) -> None:
        """The newest version to all servers, which publish it between two rounds."""
        scene, out = self._scene, self._out
        if self._sending > self._served and self._out_free_at <= now:
            self._served = self._sending
            out.versions += 1
            if scene.elsewhere:
                self._clock += scene.publish
                out.exposed += scene.publish * self._servers
        if self._ready > self._sending and self._out_free_at <= now:
            self._sending = self._ready
            if not scene.elsewhere:
                self._served = self._sending
                out.versions += 1
                return
            size = scene.version_bytes * scene.servers
            out.bytes_out += size / self._weight
            self._out_free_at = now + size / scene.link_out
