"""SGLang's door: it calls ``install`` in every process that finds cosched installed.

Inert unless ``COSCHED_CONFIG`` names a configuration. Then the algorithms that the drafters name
exist (``COSCHED_EAGLE3`` and the like), and their workers learn as that file says. SGLang only logs
a plugin that raises, so nothing is read here: a configuration that cannot be used stops
the worker, and with it the server, when it starts. Under our launcher (``cosched serve``) each
worker also reports that it stands, and rank 0 listens to operators.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cosched.engines.sglang import CONFIG, EVENTS, RESUME, START

if TYPE_CHECKING:
    from cosched.engines.sglang.launcher.run_directory import RunDirectory
    from cosched.engines.sglang.worker.adaptation import Adaptation
    from cosched.engines.sglang.worker.adapted import WorkerParts
    from cosched.engines.sglang.worker.operator import Operator
    from cosched.engines.sglang.worker.texts import Texts
    from cosched.loop.roles import Sink
    from cosched.settings.schema import Config
    from cosched.telemetry.trackers.curves import Curves


def install() -> None:
    """Register our algorithms with SGLang, if a configuration asks for them."""
    if not os.environ.get(CONFIG):
        return
    from cosched.engines.sglang.operators.server_info import show_in_server_info
    from cosched.engines.sglang.worker.algorithms import register
    from cosched.engines.sglang.worker.scheduler import watch_scheduler

    register(_build)
    watch_scheduler()
    show_in_server_info()


def _build(parts: WorkerParts) -> Adaptation:
    """The adaptation of a worker; says to the launcher whether it stands."""
    import logging

    from cosched.engines.sglang.launcher.run_directory import RunDirectory
    from cosched.errors import CoschedError

    directory = RunDirectory.current()
    rank = parts.replica * parts.ranks.size + parts.ranks.rank
    try:
        adaptation = _adaptation(parts, directory)
    except Exception as error:
        known = isinstance(error, CoschedError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        logging.getLogger("cosched").error("cannot set up rank %d: %s", rank, reason)
        if directory is not None:
            directory.report(rank, parts.algorithm, reason)
        raise
    if directory is not None:
        directory.report(rank, parts.algorithm)
    return adaptation


def _adaptation(parts: WorkerParts, directory: RunDirectory | None) -> Adaptation:
    from pathlib import Path

    from cosched.build.adaptation import build_adaptation
    from cosched.engines.sglang.launcher.resuming import STATES
    from cosched.loop.tee import Tee
    from cosched.settings.load import load_config
    from cosched.telemetry.spans import Spans, tracer_there

    config = load_config(Path(os.environ[CONFIG]))
    first = parts.ranks.rank == 0
    operator = _operator(config, directory if first else None, parts)
    events = os.environ.get(EVENTS)
    start = os.environ.get(START)
    named = f"-{parts.replica}" if parts.replica else ""
    sink = _sink(events if first else None, start if first else None, named)
    if first and (tracer := tracer_there()) is not None:
        sink = Tee(sink, Spans(tracer))
    drawn = first and not parts.replica and events is None
    curves = _curves(config, start) if drawn else None
    resume = Path(path) if (path := os.environ.get(RESUME)) else None
    states = Path(start) / STATES if start else None
    if resume is not None:
        states = resume.parent
    texts = _texts(config, parts, start, named) if first else None
    return build_adaptation(
        config, parts, operator, sink, bool(events), states, resume, texts, curves
    )


def _operator(config: Config, directory: RunDirectory | None, parts: WorkerParts) -> Operator:
    from cosched.engines.sglang import compat
    from cosched.engines.sglang.operators.control import SocketOperator
    from cosched.engines.sglang.operators.metrics import Metrics
    from cosched.engines.sglang.worker.operator import NullOperator

    if directory is None:
        return NullOperator()
    show = None
    if compat.get_observability().enable_metrics:
        name = compat.get_serving().served_model_name or config.target.path
        show = Metrics(name, parts.replica if parts.replicas > 1 else None).show
    return SocketOperator(directory.socket(parts.replica), show)


def _texts(config: Config, parts: WorkerParts, start: str | None, named: str) -> Texts | None:
    """What keeps texts into the folder of this start; None where nobody has asked for that."""
    import time
    from pathlib import Path

    from cosched.engines.sglang.worker.texts import Texts
    from cosched.errors import ConfigError
    from cosched.telemetry.history import History

    if not config.record.text:
        return None
    if start is None:
        raise ConfigError("record.text: only cosched serve has a folder for texts; leave it out")
    parts.target.decode([])  # or say now that there is no tokenizer
    history = History(Path(start) / f"texts{named}.jsonl", time.time, private=True)
    return Texts(history, config.record.text_share, parts.target.decode)


def _curves(config: Config, start: str | None) -> Curves | None:
    """What trackers draw in the folder of this start; None where nobody has asked for that."""
    from pathlib import Path

    from cosched.build.curves import build_curves
    from cosched.errors import ConfigError

    if config.run.trackers and start is None:
        raise ConfigError("run.trackers: only cosched serve has a folder for them; leave them out")
    folder = Path(start or "")
    return build_curves(config, folder, folder.name)


def _sink(events: str | None, start: str | None, named: str) -> Sink:
    """Every event into the one file, or else what is worth keeping into the folder of this start."""
    import time
    from pathlib import Path

    from cosched.telemetry.history import History
    from cosched.telemetry.run_folder import EventLog, NoEvents

    if events is None:
        return History(Path(start) / f"events{named}.jsonl", time.time) if start else NoEvents()
    log = EventLog()
    log.open(Path(events), buffered=False)
    return log.for_arm("served")
