"""What a round takes, by how many tokens it drafts for each request and how many requests there are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SAMPLES = 9  # rounds of a length, the newest, whose median is what it takes
TRIED_FIRST = (0, 1)  # lengths
ENOUGH = 2  # of them tell something: the lower one, where a first round is slow
LINE = 2.0  # rounds that the line through all lengths counts for
NOW = 9  # rounds of the yardstick, the newest, whose median says how slow all are
STALE = 64  # rounds after which all but the newest samples of a length are forgotten
AWAY = 8  # rounds of other lengths, less those of its own, after which a length is no yardstick


class RoundSeconds:
    """Seconds of a round that drafts K tokens a request, measured while serving.

    Machines slow down, contexts grow, and a length is not tried all the time. So the length that is
    drafted most is the yardstick: its rounds say how slow all are just now, and those of others what
    they take relative to it. That is the median of their newest rounds, drawn to the line through all
    K > 0 (rows cost alike), and made monotone: one slow round tells nothing. Batches of 1, 2, up to 4,
    up to 8 and so on differ in that; within them, each number of requests is as slow as it is. One
    token and none have to be tried first, by which a line is there; others are on it until they are.
    """

    def __init__(self, max_tokens: int) -> None:
        self._lengths = range(max_tokens + 1)
        self._levels: dict[int, deque[float]] = {}  # seconds of 1, by the number of requests
        self._sizes: dict[int, _Size] = {}

    def observe(self, num_running: int, tokens: int, seconds: float) -> None:
        """One more round."""
        size = self._size(num_running)
        level = seconds / size.usual(tokens)
        levels = self._levels.setdefault(num_running, deque([level], maxlen=NOW))
        if size.is_yardstick(tokens):
            levels.append(level)
        size.note(tokens, seconds / median_low(levels))

    def table(self, num_running: int) -> tuple[float, ...]:
        """Seconds by K, from 0 on; 0 where a length has to be tried first."""
        size, level = self._size(num_running), median_low(self._levels.get(num_running, (1.0,)))
        return tuple(
            0.0 if k in TRIED_FIRST and len(size.samples[k]) < ENOUGH else level * relative
            for k, relative in enumerate(size.smooth())
        )

    def _size(self, num_running: int) -> _Size:
        size = (num_running - 1).bit_length()
        if size not in self._sizes:
            self._sizes[size] = _Size([deque[float](maxlen=SAMPLES) for _ in self._lengths])
        return self._sizes[size]


@dataclass(slots=True)
class _Size:
    """Batches that are alike: the newest rounds of each length, in units that the yardstick keeps."""

    samples: list[deque[float]]
    yardstick: int | None = None
    away: int = 0
    now: int = 0
    newest: dict[int, int] = field(default_factory=dict[int, int])

    def usual(self, tokens: int) -> float:
        """What a round of that length takes."""
        samples = self.samples[tokens]
        return median_low(samples) if samples else self.smooth()[tokens]

    def is_yardstick(self, tokens: int) -> bool:
        """Whether that length is, which has just been drafted once more."""
        if self.yardstick is None or self.away >= AWAY:
            self.yardstick, self.away = tokens, 0
        self.away = max(0, self.away + (1 if tokens != self.yardstick else -1))
        return tokens == self.yardstick and len(self.samples[tokens]) >= ENOUGH

    def note(self, tokens: int, relative: float) -> None:
        """One more round; the yardstick itself is not measured by it."""
        samples, self.now = self.samples[tokens], self.now + 1
        if self.now - self.newest.get(tokens, self.now) > STALE:
            while len(samples) > ENOUGH:
                samples.popleft()
        self.newest[tokens] = self.now
        if tokens != self.yardstick or len(samples) < ENOUGH:
            samples.append(relative)

    def smooth(self) -> list[float]:
        """What each length takes: its own rounds, the line through all, and never less than a shorter.

        At the very beginning all take 1.
        """
        if not any(self.samples):
            return [1.0] * len(self.samples)
        weights = [len(found) for found in self.samples]
        medians = {k: median_low(found) for k, found in enumerate(self.samples) if found}
        drafting = {k: median for k, median in medians.items() if k}
        # Of one length alone that drafts, each token is taken to cost what it costs over none.
        line = _line(drafting if len(drafting) > 1 else medians, weights)
        drawn = [line(k) for k in range(len(self.samples))]
        for k, median in medians.items():
            own, others = weights[k], LINE if k else 0.0  # without drafts there is no draft to run
            drawn[k] = (own * median + others * drawn[k]) / (own + others)
        return _monotone(drawn, [weight + LINE for weight in weights])


def _line(points: Mapping[int, float], weights: Sequence[int]) -> Callable[[int], float]:
    """The weighted least-squares line through points by x; it does not fall."""
    total = sum(weights[x] for x in points) or 1
    mean_x = sum(weights[x] * x for x in points) / total
    mean_y = sum(weights[x] * y for x, y in points.items()) / total
    spread = sum(weights[x] * (x - mean_x) ** 2 for x in points)
    along = sum(weights[x] * (x - mean_x) * y for x, y in points.items())
    slope = max(0.0, along / spread) if spread else 0.0
    return lambda x: mean_y + slope * (x - mean_x)


def _monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values, by weighted squares, that do not fall (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, heavy, many = pools.pop()
            both = heavy + pool[1]
            pool = ((mean * heavy + pool[0] * pool[1]) / both, both, many + pool[2])
        pools.append(pool)
    return [mean for mean, _, many in pools for _ in range(many)]
