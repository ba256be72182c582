"""The ranks of one tensor-parallel server, each of which hears the trainer: they publish in the same round."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosched.sidecar.versions import Arrival
    from cosched.training.ranks import Ranks


class Together:
    """The newest version that has come to every rank.

    Each has a link of its own, so no weights go from rank to rank while requests wait. Rounds are the same on
    all of them: the ``first`` sends them, and decides whether a version is wanted.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.first = ranks.rank == 0
        self._ranks = ranks
        self._held: Arrival | None = None

    def agreed(self, new: Arrival | None, wanted: bool) -> Arrival | None:
        """What all ranks have, if the first wants it; ``new`` has come to this one. All ask in the same round.

        Raises:
            PartedError: another rank has stopped.
        """
        if new is not None:
            self._held = new
        if self._ranks.parted:
            return None
        own = self._held.version.version if self._held else 0
        _, number = self._ranks.meet(number=own if wanted else 0)
        if not number:
            return None
        missing, _ = self._ranks.meet(asked=own != number)
        if missing:
            return None
        held, self._held = self._held, None
        return held
