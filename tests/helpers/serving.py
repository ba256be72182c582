"""Serving without SGLang: a configuration, some of SGLang's arguments, and a status."""

from __future__ import annotations

import argparse

from cosched.engines.sglang.worker.operator import Status
from cosched.settings.load import load_config
from cosched.settings.schema import Config
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


def config(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def sglang_parser() -> argparse.ArgumentParser:
    """A few of SGLang's arguments, in each of the forms that it declares them in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", "--model", required=True)
    for name in ("--dtype", "--device", "--attention-backend", "--api-key"):
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
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--fdfo", action=argparse.BooleanOptionalAction, default=True)
    return parser
