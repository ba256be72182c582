"""What a trainer does with what it hears: on one rank, or on several that do all of it alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cosched.errors import PublicationError
from cosched.loop.tensors import with_tensors
from cosched.training.ranks import PartedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from cosched.coscheduler import Coscheduler
    from cosched.records import VerifyRound
    from cosched.sidecar.versions import Versions
    from cosched.training.ranks import Ranks


class Keeps(Protocol):
    """What saves the state of learning, when that is due and at the end."""

    trouble: str | None
    """Why the last one was not saved."""

    def due(self) -> bool: ...

    def take(self, trains: bool = True) -> None: ...

    def end(self, trains: bool) -> None: ...


class Learning:
    """A co-scheduler, its versions, and what saves them, if anything does.

    Rounds are learnt from on ``device``, where they may have to go; None: they are there.
    """

    def __init__(
        self,
        coscheduler: Coscheduler,
        versions: Versions,
        saving: Keeps | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.coscheduler = coscheduler
        self.versions = versions
        self._saving = saving
        self._device = device

    def on_round(self, round_: VerifyRound) -> None:
        if (device := self._device) is not None:
            round_ = with_tensors(round_, lambda tensor: tensor.to(device))
        self.coscheduler.on_round(round_)

    def roll_back(self, version: int) -> None:
        self.coscheduler.roll_back(version)

    def serve_as(self, number: int, of: int) -> None:
        self.versions.serve_as(number, of)

    def take_up(self, weights: Mapping[str, Tensor], version: int, checksum: str) -> bool:
        return self.versions.take_up(weights, version, checksum)

    @property
    def trouble(self) -> str | None:
        """Why what was learnt is not saved; None where it is, or nothing is to be."""
        return None if self._saving is None else self._saving.trouble

    def due(self) -> bool:
        return self._saving is not None and self._saving.due()

    def save(self) -> None:
        if self._saving is not None:
            self._saving.take()

    def end(self, trains: bool) -> None:
        """Nothing comes any more: save what was learnt, or what serves alone where nothing ``trains`` now."""
        if self._saving is not None:
            self._saving.end(trains)


class FirstRank(Learning):
    """Of several ranks the first, which hears servers: what it does, all others do (``OtherRank``)."""

    def __init__(self, own: Learning, ranks: Ranks) -> None:
        super().__init__(own.coscheduler, own.versions)
        self._own = own
        self._ranks = ranks

    def on_round(self, round_: VerifyRound) -> None:
        # A view of memory that is shared with a server would be sent with all of that memory.
        self._all("on_round", with_tensors(round_, lambda tensor: tensor.cpu().clone()))

    def roll_back(self, version: int) -> None:
        self._all("roll_back", version)

    def serve_as(self, number: int, of: int) -> None:
        self._all("serve_as", number, of)

    def take_up(self, weights: Mapping[str, Tensor], version: int, checksum: str) -> bool:
        copies = {name: weight.clone() for name, weight in weights.items()}
        return bool(self._all("take_up", copies, version, checksum))

    @property
    def trouble(self) -> str | None:
        return self._own.trouble

    def due(self) -> bool:
        return self._own.due()

    def save(self) -> None:
        self._all("save")

    def end(self, trains: bool) -> None:
        try:
            self._all("end", trains)
        except PartedError:
            self._own.end(trains=False)

    def _all(self, name: str, *args: Any) -> Any:
        """Do it here as everywhere.

        Raises:
            PartedError: another rank has stopped.
        """
        _told(self._ranks, (name, args))
        return _done(self._own, self._ranks, name, args)


class OtherRank:
    """One of the other ranks: it does what the first has all do."""

    def __init__(self, own: Learning, ranks: Ranks) -> None:
        self._own = own
        self._ranks = ranks

    def run(self, ends: Callable[[], bool]) -> None:  # noqa: ARG002
        """Until the first rank says that it is the end: a signal to stop is the first one's to take.

        Raises:
            PartedError: the first rank has stopped.
        """
        name = ""
        while name != "end":
            name, args = _told(self._ranks, None)
            try:
                _done(self._own, self._ranks, name, args)
            except PublicationError:
                if name != "roll_back":  # refused on the first one too, which says so
                    raise


def _told(ranks: Ranks, mine: tuple[str, tuple[Any, ...]] | None) -> Any:
    """What the first rank has all do next."""
    if ranks.parted:
        raise PartedError("another rank stopped training")
    try:
        return ranks.from_first(mine)
    except RuntimeError as error:  # a process that has ended, or does not answer
        ranks.parted = True
        raise PartedError("another rank is gone") from error


def _done(own: Learning, ranks: Ranks, name: str, args: tuple[Any, ...]) -> Any:
    try:
        return getattr(own, name)(*args)
    except Exception as error:
        if not (name == "roll_back" and isinstance(error, PublicationError)):
            ranks.part()  # they may wait for what this one has to say
        raise
