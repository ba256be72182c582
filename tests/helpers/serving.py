"""Serving without SGLang: a configuration, some of SGLang's arguments, and a status."""

from __future__ import annotations

import argparse

import msgspec

from cosched.engines.sglang.worker.operator import Status
from cosched.records import GuardFigures, RoundRow
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.tally import Tally
from tests.helpers.paths import ROOT

TINY = ROOT / "configs" / "serve_tiny_cpu.yaml"


STATUS = Status(
    algorithm="COSCHED_EAGLE3",
    adapting=True,
    failure=None,
    warning=None,
    draft_version=3,
    rounds=10,
    acceptance_length=2.5,
    recent_acceptance_length=2.25,
    updates=4,
    skipped_steps=0,
    starved_decisions=0,
    update_seconds=1.0,
    background_seconds=0.0,
    publish_seconds=0.5,
    draft_seconds=2.0,
    verify_seconds=3.0,
    last_loss=0.1,
)


def busy() -> Status:
    """A server that has something in every part of the frame."""
    tally = Tally(lambda: 1_700_000_000.0)
    for number in range(600):
        accepted = (3, 1, 2, 3)[number % 4]
        tally.observe(RoundRow("r", number, number // 100, 3, accepted, accepted + 1))
    guard = GuardFigures(
        better=1.0, better_bound=1.6, worse=-0.5, worse_bound=3.0, trusted=False,
        serves_loaded=False, lead_tokens=0.12, lead_error=0.05, serving_score=2.2, loaded_score=2.0,
    )  # fmt: skip
    return msgspec.structs.replace(
        STATUS,
        figures=tally.figures(),
        rounds_by_drafted=(0, 0, 0, 600),
        guard=guard,
        frozen_acceptance_length=2.0,
        round_seconds=0.0412,
        num_running=3,
        num_queued=2,
        replay_tokens=1024,
        replay_bytes=1 << 20,
        replay_max_bytes=1 << 28,
        resident_bytes=3 << 30,
        alarms={"place": "place 3 is accepted in 4% of 400 times, place 2 in 61%"},
    )


def config(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def sglang_parser() -> argparse.ArgumentParser:
    """A few of SGLang's arguments, in each of the forms that it declares them in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", "--model", required=True)
    for name in ("--dtype", "--device", "--attention-backend", "--host", "--api-key"):
        parser.add_argument(name)
    for name in ("--speculative-algorithm", "--speculative-draft-model-path"):
        parser.add_argument(name)
    for name in (
        "--max-running-requests", "--random-seed", "--speculative-num-steps", "--dp-size", "--port",
        "--speculative-eagle-topk", "--speculative-num-draft-tokens", "--max-total-tokens",
        "--speculative-draft-window-size",
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=1)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--cuda-graph-bs", type=int, nargs="+")
    for name in ("--disable-cuda-graph", "--enable-metrics", "--sleep-on-idle"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--fdfo", action=argparse.BooleanOptionalAction, default=True)
    return parser
