"""What an operator should look at: conclusions from numbers, the same for screen, metrics and alerts.

The text that clients get is right whatever the draft does, so nothing but these figures shows that it
has stopped helping. Windows are counted in request rounds (``tally``), so that a busy server is warned
sooner than an idle one. Every comparison of shares asks for a difference that matters and one that is
``CERTAIN`` standard errors wide:

    place          drafts at one place are accepted less than a quarter as often as at the one before
    fell           accepted drafts among those judged, in the newest stretch, are down by a quarter
    not_as_scored  what serves accepts less than half of what the guard scores its weights at
    useless        drafts that are verified and hardly ever accepted

Weak drafts on foreign text fall from place to place, by two thirds as has been seen, so a place counts as
broken only below a quarter. Neighbouring rounds of a text are alike, so a standard error as of independent ones is too small; four of
them are for the three that are meant (``guard.statistics`` has the measured correlation).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.records import GuardFigures
    from cosched.telemetry.tally import Figures, Stretch

FEWEST = 256  # request rounds below which a stretch says nothing
CERTAIN = 4.0  # standard errors
BROKEN = 0.25  # of the share that is accepted at the place before
HALF = 0.5
FALLEN = 0.75  # of the usual share that is accepted
USELESS = 0.1  # accepted drafts a request round

ALARMS = {
    "failed": "Training has stopped for good.",
    "warned": "Something is wrong that did not stop training.",
    "place": "Drafts at one place are accepted far less often than those before it.",
    "fell": "Drafts are accepted far less often than they were.",
    "not_as_scored": "The draft that serves does far worse than its weights were scored.",
    "useless": "Drafts are verified and hardly ever accepted.",
}
SAID_ELSEWHERE = frozenset({"failed", "warned"})  # a status has fields of their own for them


def alarms(
    figures: Figures,
    guard: GuardFigures | None = None,
    failure: str | None = None,
    warning: str | None = None,
) -> dict[str, str]:
    """What is wrong now, by the names of ``ALARMS``, each with its figures."""
    found = {name: text for name, text in (("failed", failure), ("warned", warning)) if text}
    if figures.recent.rounds < FEWEST:
        return found
    conclusions = {
        "place": next(_weak_places(figures.recent), None),
        "fell": _fall(figures),
        "not_as_scored": _not_as_scored(figures, guard),
        "useless": _useless(figures.recent),
    }
    return found | {name: text for name, text in conclusions.items() if text}


def _weak_places(recent: Stretch) -> Iterator[str]:
    for number, (before, place) in enumerate(
        zip(recent.places, recent.places[1:], strict=False), 2
    ):
        if before.share and place.share is not None:
            limit = BROKEN * before.share
            if _certainly_below(place.share, limit, place.reached):
                yield (
                    f"place {number} is accepted in {place.share:.0%} of {place.reached:.0f} times, "
                    f"place {number - 1} in {before.share:.0%}"
                )


def _fall(figures: Figures) -> str | None:
    now, usual = figures.recent.judged, figures.before.judged
    if figures.before.rounds < FEWEST or not usual.share or now.share is None:
        return None
    if not _certainly_below(now.share, FALLEN * usual.share, now.reached):
        return None
    return f"{now.share:.0%} of the drafts that were judged are accepted, {usual.share:.0%} before"


def _not_as_scored(figures: Figures, guard: GuardFigures | None) -> str | None:
    length = figures.recent.acceptance_length
    if guard is None or guard.serving_score is None or length is None:
        return None
    if guard.serves_loaded or length - 1 >= HALF * (guard.serving_score - 1):
        return None
    return (
        f"{length:.2f} tokens a round are committed where the guard scores the weights that should "
        f"serve at {guard.serving_score:.2f}"
    )


def _useless(recent: Stretch) -> str | None:
    length = recent.acceptance_length
    if length is None or length - 1 >= USELESS:
        return None
    return f"{length:.2f} tokens a round are committed; 1 is what there is without a draft"


def _certainly_below(share: float, limit: float, number: float) -> bool:
    """Whether so many drafts would hardly have such a share if it were the ``limit`` in truth."""
    return share < limit - CERTAIN * math.sqrt(limit * (1 - limit) / number)
