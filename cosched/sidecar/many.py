"""A guard that hears of several servers, each of which serves the version that has reached it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.loop.roles import Guard
    from cosched.records import GuardFigures, Snapshot, Standing, UpdateResult, Verdict, VerifyRound


class GuardOfMany:
    """Another guard, told of each round by what that one was served with.

    ``served_loaded`` says of the round that comes whether that was the draft as loaded; None: it is of
    no server, and what serves here goes for it. All servers' rounds are evidence for one verdict.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.served_loaded: bool | None = None

    @property
    def busy(self) -> bool:
        return self._guard.busy

    @property
    def standing(self) -> Standing:
        return self._guard.standing

    def observe(self, round_: VerifyRound, serves_loaded: bool) -> None:
        own = self.served_loaded
        self._guard.observe(round_, serves_loaded if own is None else own)

    def figures(self, serves_loaded: bool) -> GuardFigures | None:
        return self._guard.figures(serves_loaded)

    def judge(
        self,
        result: UpdateResult | None,
        seen: Snapshot,
        candidate: Callable[[], Mapping[str, Tensor]],
    ) -> Verdict:
        return self._guard.judge(result, seen, candidate)

    def request_ended(self, round_: int) -> None:
        self._guard.request_ended(round_)

    def start_anew(self, round_: int) -> None:
        self._guard.start_anew(round_)

    def state(self) -> Mapping[str, Tensor]:
        return self._guard.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._guard.restore(tensors)
