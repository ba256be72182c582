"""Versions as servers are told of them: number, parent, checksum, and the weights behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosched.sidecar.messages import MOST_KEPT, Version
from cosched.sidecar.weights import pack_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.coscheduler import Coscheduler
    from cosched.loop.publish import InPlacePublisher
    from cosched.loop.roles import Sink
    from cosched.sidecar.wire import Bytes


@dataclass(frozen=True, slots=True)
class Serving:
    """What serves: its number, its checksum, and the weights of it if somebody wants them."""

    version: int
    checksum: str
    as_loaded: bool
    weights: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A version that has come. ``weights`` are None where it is the draft as loaded."""

    version: Version
    weights: Mapping[str, Tensor] | None


class Lineage:
    """A sink that keeps of the newest version what servers are told of it, and passes all on."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._back_to: int | None = None
        self.version, self.parent, self.checksum = 0, 0, ""

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "rollback":
            self._back_to = fields["to"]
        elif kind == "publication":
            parent = self.version if self._back_to is None else self._back_to
            self.note(fields["version"].version, parent, fields["version"].draft_checksum)
            self._back_to = None
        self._sink.emit(kind, **fields)

    def note(self, version: int, parent: int, checksum: str) -> None:
        """That is what serves now."""
        self.version, self.parent, self.checksum = version, parent, checksum


@dataclass(frozen=True, slots=True)
class Announcement:
    """A version as it goes out; what is signed of its bytes is the same for all servers."""

    message: Version
    payload: Bytes
    digest: bytes


class Versions:
    """What the trainer's own draft serves stands for what all servers serve.

    ``digest`` gives what is signed of a version's bytes. A co-scheduler that has been restored goes on with
    the version that it had.
    """

    def __init__(
        self,
        coscheduler: Coscheduler,
        publisher: InPlacePublisher,
        lineage: Lineage,
        digest: Callable[[Bytes], bytes],
    ) -> None:
        self.newest: Announcement | None = None
        self.lineage = lineage
        self._coscheduler = coscheduler
        self._publisher = publisher
        self._digest = digest
        self._loaded = {0}
        if publisher.version:
            lineage.note(publisher.version, publisher.version, publisher.draft_checksum())

    @property
    def known(self) -> Mapping[str, Tensor]:
        """The draft's tensors, by which what comes is checked."""
        return self._publisher.served

    @property
    def kept(self) -> tuple[int, ...]:
        """Those that can be gone back to, the newest last, of which there may be more."""
        return self._publisher.kept[-MOST_KEPT:]

    def is_loaded(self, version: int) -> bool:
        """Whether that was the draft as loaded."""
        return version in self._loaded

    def renewed(self) -> Announcement | None:
        """The newest version, if it is newer than that which was asked for last."""
        own, newest = self.lineage, self.newest
        if own.version == (newest.message.version if newest else 0):
            return None
        parts, payload = (), b""
        if as_loaded := self._coscheduler.counters.serves_loaded:
            self._loaded.add(own.version)
        else:
            parts, tensor = pack_weights(self._publisher.weights_of(own.version))
            payload = tensor.numpy().data
        message = Version(
            version=own.version,
            parent=own.parent,
            checksum=own.checksum,
            as_loaded=as_loaded,
            parts=parts,
        )
        self.newest = Announcement(message, payload, self._digest(payload))
        return self.newest

    def serve_as(self, number: int, of: int) -> None:
        """Serve version ``of``, 0 or that which serves, under another number."""
        counters = self._coscheduler.counters
        counters.serves_loaded = counters.serves_loaded or of == 0
        done = self._publisher.publish(self._publisher.weights_of(of), number)
        self.lineage.note(number, of, done.draft_checksum)

    def take_up(self, weights: Mapping[str, Tensor], version: int, checksum: str) -> bool:
        """Serve what a server has as ``version``, and learn on from there, with an empty optimizer.

        False where that is not what has the ``checksum``: then the draft as loaded serves, as the next.
        """
        trainer = self._coscheduler.trainer
        assert trainer is not None, "a side-car without one is refused when it is built"
        done = self._publisher.publish(weights, version)
        if done.draft_checksum != checksum:
            self.serve_as(version + 1, of=0)
            return False
        self._coscheduler.counters.serves_loaded = False
        self.lineage.note(version, version, done.draft_checksum)
        trainer.load(self._publisher.weights_of(version))
        return True
