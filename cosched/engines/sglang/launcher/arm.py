"""An arm of an experiment that SGLang decodes: one ``sglang.Engine``, while the arm runs."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.engines.embedded.engine import EngineSeconds
from cosched.engines.request import FinishedRequest, GenerationRequest
from cosched.engines.sglang.launcher.launch import start_engine
from cosched.loop.counters import Counters
from cosched.records import RoundRow

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from cosched.engines.embedded.engine import OnRow
    from cosched.engines.sglang.launcher.arguments import Speculation
    from cosched.loop.roles import Sink
    from cosched.settings.schema import Config


class ServedEngine:
    """Decodes groups of requests; between ``running`` and its end the engine is up.

    ``counters`` and ``version`` are what the scheduler process reports of the draft. ``sink``
    gets its events (decisions, updates, publications); rounds come with the finished requests, and before
    that, among the events, to ``on_row``.
    """

    def __init__(
        self,
        config: Config,
        speculation: Speculation,
        sampling: dict[str, Any],
        sink: Sink,
        on_tokens: Callable[[int], None],
        on_row: OnRow | None = None,
    ) -> None:
        self.seconds = EngineSeconds()
        self.counters = Counters()
        self.version = 0
        self.trouble: str | None = None  # what the scheduler process warned of in the end
        self.config = config
        self._speculation: Speculation = speculation
        self._sampling = sampling
        self._sink = sink
        self._on_tokens = on_tokens
        self._on_row = on_row
        self._engine: Any = None
        self._events = Path()
        self._events_read = 0

    @contextmanager
    def running(self, checkpoint: Path | None) -> Generator[None]:
        """Start the engine; at the end its draft is saved to ``checkpoint``, if one is named."""
        with tempfile.TemporaryDirectory(prefix="cosched-") as folder:
            self._events = Path(folder) / "events.jsonl"
            self._engine = start_engine(
                self.config, self._speculation, {"log_level": "error"}, self._events
            )
            try:
                yield
                if checkpoint is not None:
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                    self._engine.cosched.save(checkpoint)
            finally:
                self._engine.shutdown()
                self._engine = None

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[FinishedRequest]:
        """Decode a group at once, and then what the conversations in it go on to ask."""
        group = list(requests)
        while group:
            finished = self._decode(group)
            yield from finished
            group = [one.following for one in finished if one.following is not None]

    def _decode(self, requests: Sequence[GenerationRequest]) -> list[FinishedRequest]:
        started = time.perf_counter()
        answers = self._engine.generate(
            input_ids=[request.prompt_P.tolist() for request in requests],
            sampling_params=[
                {**self._sampling, "max_new_tokens": request.max_new_tokens} for request in requests
            ],
            rid=[request.id for request in requests],
        )
        wall = time.perf_counter() - started
        self._on_tokens(sum(len(answer["output_ids"]) for answer in answers))
        rows = self._take_events()
        self._take_status(wall)
        finished: list[FinishedRequest] = []
        for request, answer in zip(requests, answers, strict=True):
            tokens = tuple(answer["output_ids"])
            rounds = (
                _of_plain(request.id, len(tokens))
                if self._speculation == "plain"
                else _clipped([row for row in rows if row.request_id == request.id], len(tokens))
            )
            stopped = answer["meta_info"]["finish_reason"]["type"] == "stop"
            one = FinishedRequest(request, tokens, rounds, stopped)
            finished.append(one.with_next_turn())
        return finished

    def abandon(self) -> list[FinishedRequest]:
        """What an interrupted group had is not known here."""
        return []

    def _take_events(self) -> list[RoundRow]:
        """What the scheduler process wrote since the last group: its rounds."""
        if not self._events.exists():
            return []
        with self._events.open("rb") as file:
            file.seek(self._events_read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._events_read += whole
        rows: list[RoundRow] = []
        for line in data[:whole].splitlines():
            event = msgspec.json.decode(line)
            kind = event.pop("kind")
            event.pop("arm")
            if kind == "round":
                rows.append(msgspec.convert(event["row"], RoundRow))
                if self._on_row:
                    self._on_row(rows[-1])
                continue
            if kind == "update":
                self.counters.losses.append(event["result"]["losses"][-1])
            self._sink.emit(kind, **event)
        return rows

    def _take_status(self, wall: float) -> None:
        if self._speculation == "plain":
            self.seconds.verify += wall
            return
        status = self._engine.cosched.status()
        self.seconds.draft, self.seconds.verify = status.draft_seconds, status.verify_seconds
        self.version = status.draft_version
        self.counters.updates, self.counters.skipped_steps = status.updates, status.skipped_steps
        self.counters.update_seconds_total = status.update_seconds
        self.counters.publish_seconds = status.publish_seconds
        self.counters.guard_seconds = status.guard_seconds
        self.counters.refused = status.refused_updates
        self.counters.rolled_back = status.rollbacks
        self.counters.evicted = status.evicted_requests
        self.trouble = status.warning


def _of_plain(request_id: str, num_tokens: int) -> tuple[RoundRow, ...]:
    """A round a token, behind the first, which the prefill gave."""
    return tuple(RoundRow(request_id, place, 0, 0, 0, 1) for place in range(1, num_tokens))


def _clipped(rows: list[RoundRow], num_tokens: int) -> tuple[RoundRow, ...]:
    """Rounds up to the end of the text: the last may have verified more than was asked for."""
    kept: list[RoundRow] = []
    for row in rows:
        left = num_tokens - row.position
        if left <= 0:
            break
        committed = min(row.num_committed, left)
        accepted = min(row.num_accepted, committed)
        kept.append(msgspec.structs.replace(row, num_committed=committed, num_accepted=accepted))
    return tuple(kept)
