"""``cosched train``: learning in a process of its own, until it is told to end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from cosched.build.curves import build_curves
from cosched.build.sidecar import build_sidecar
from cosched.loop.tee import Tee
from cosched.settings.load import check_paths
from cosched.telemetry.history import History
from cosched.telemetry.run_folder import NoEvents, explained, trainer_folder
from cosched.telemetry.spans import Spans, tracer_there
from cosched.training.ranks import rank_and_size

if TYPE_CHECKING:
    from cosched.settings.schema import Config

logger = logging.getLogger("cosched")


def train(config: Config, arm: str, resume: bool) -> None:
    """Listen, learn and publish, until SIGTERM or Ctrl-C; what is learnt by then is saved.

    Raises:
        CoschedError: a setting or file is wrong, or learning cannot go on.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, force=True)
    ended = threading.Event()

    def end(_signal: int, _frame: Any) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    check_paths(config)
    if config.engine.num_threads is not None:
        torch.set_num_threads(config.engine.num_threads)
    folder = trainer_folder(config.run_folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if rank_and_size()[0]:  # the first hears servers, and says what happens
        build_sidecar(config, arm, resume, NoEvents()).run(ended.is_set)
        return
    history = History(folder / "events.jsonl", time.time)
    curves = None
    try:
        tracer = tracer_there()
        curves = build_curves(config.for_arm(arm), folder, time.strftime("%Y%m%d-%H%M%S"))
        sinks = [history, *([Spans(tracer)] if tracer else []), *([curves] if curves else [])]
        on_round = curves.observe_round if curves else None
        service = build_sidecar(config, arm, resume, Tee(*sinks), on_round)
        logger.info(
            "cosched trains for servers at %s; %s has what it saves",
            config.adapt.sidecar.address,
            folder,
        )
        service.run(ended.is_set)
    finally:
        if curves is not None:
            curves.close()
        history.close()
