"""Faults planted into the tiny world: each raises its alarm within a stated number of request rounds.

The rounds go the way that a server's go (``tests.helpers.watched``), so what is asserted of the alarms
holds for ``/cosched/status``, ``/metrics`` and the alerts, which show them as they are.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosched.engines.sglang.operators.metrics import samples
from cosched.engines.sglang.worker.operator import Status
from cosched.loop import publish
from tests.helpers.guarded_runs import FAR, world_of
from tests.helpers.paths import ROOT
from tests.helpers.watched import Watched

WITHIN = 512  # request rounds
FEW = ("engine.max_batch=2", "engine.pack=false")
NO_UPDATES = "adapt.policy.rounds=1000000"
PROMTOOL = shutil.which("promtool")


def shuffle_place(watched: Watched, place: int, vocab_size: int) -> None:
    """From now on that place's tokens are others, each always the same other one."""
    drafter: Any = watched.arm.drafter
    propose = drafter.propose

    def shuffled(*args: Any, **options: Any) -> Any:
        proposal = propose(*args, **options)
        tokens_BK = proposal.tokens_BK.clone()
        tokens_BK[:, place] = (7 * tokens_BK[:, place] + 13) % vocab_size
        return replace(proposal, tokens_BK=tokens_BK)

    drafter.propose = shuffled


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle3", pytest.param("pard", marks=pytest.mark.long)])
def test_a_draft_whose_third_place_is_shuffled_is_named_by_place(kind: str, tmp_path: Path) -> None:
    """From the start on, so there is nothing to compare with but the other places."""
    world = world_of(
        f"drafter.kind={kind}", NO_UPDATES, *FEW, tokens=320, prompts=4
    )  # fmt: skip
    watched = Watched(world)
    shuffle_place(watched, 2, world.target.vocab_size)
    watched.decode()
    assert watched.alarms["place"] <= WITHIN
    last = watched.statuses[-1][1]
    assert "place 3 " in last.alarms["place"]
    shares = [place.share or 0.0 for place in last.figures.total.places]
    assert shares[2] < 0.1 < shares[1]
    alerts(watched.statuses, "CoschedPlaceBroken", tmp_path)


@pytest.mark.slow
def test_a_publication_that_writes_half_stops_training_in_that_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Checksums tell: it is undone, the draft of before goes on serving, and an operator is told at once."""
    world = world_of(*FEW, "adapt.guard.kind=finite", tokens=160, prompts=2)
    whole, begun = publish._write, []

    def half(storage: Any, values: Any) -> None:
        draft = watched.coscheduler.publisher._serving.draft
        if storage is draft and watched.coscheduler.version == 2 and not begun:
            begun.append(watched.count)
            values = dict(list(values.items())[::2])
        whole(storage, values)

    watched = Watched(world, look_every=1)
    monkeypatch.setattr(publish, "_write", half)
    watched.decode()
    (at,) = begun
    assert watched.alarms["failed"] - at <= 2  # the round itself, of two requests
    status = watched.statuses[-1][1]
    assert "publication 3 undone: the draft's checksum" in status.alarms["failed"]
    assert status.draft_version == 2
    assert not status.adapting
    assert watched.count > at + 40, "it serves on"
    alerts(watched.statuses, "CoschedTrainingFailed", tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "whole"])
def test_half_of_the_weights_lost_where_they_serve_is_told_by_scores(
    damaged: bool, tmp_path: Path
) -> None:
    """What checksums cannot see, because it comes after them: half of the draft's tensors are zeros where
    they serve, while the guard keeps and scores what was published. Whole weights raise nothing."""
    world = world_of(*FEW, *FAR, "adapt.policy.rounds=16", tokens=400, prompts=2)
    watched, published = Watched(world), []
    publisher: Any = watched.coscheduler.publisher
    whole = publisher.publish

    def publish_half(weights: Any) -> Any:
        version = whole(weights)
        published.append(watched.count)
        if damaged:
            for tensor in list(publisher._serving.draft.values())[::2]:
                tensor.data.zero_()
        return version

    publisher.publish = publish_half
    watched.decode()
    assert published
    if damaged:
        assert watched.alarms["not_as_scored"] - published[0] <= WITHIN
        estimates = [status.frozen_acceptance_length for _, status in watched.statuses]
        assert all(length is None or length >= 1 for length in estimates)
        alerts(watched.statuses, "CoschedNotAsScored", tmp_path)
    else:
        assert watched.alarms.keys() <= {"fell"}


@pytest.mark.slow
@pytest.mark.long
def test_traffic_that_changes_language_is_a_fall_and_no_fault_of_the_draft(tmp_path: Path) -> None:
    """From code, where the draft is at home, to translated text: the newest requests accept far less, no
    place is broken, and τ of the frozen draft, which this one is, has fallen as much."""
    texts = "[tinyworld/documents/code.jsonl, tinyworld/documents/translated.jsonl]"
    world = world_of(
        *FEW, "workload.prompts=null", f"workload.documents={texts}", NO_UPDATES,
        tokens=900, prompts=2,
    )  # fmt: skip
    changed: list[int] = []

    def note_change(count: int) -> None:
        foreign = {request.id for request in world.requests[2:]}
        running = {slot.request.id for slot in watched.arm.engine._slots}
        if not changed and running & foreign:
            changed.append(count)

    watched = Watched(world, before_round=note_change)
    watched.decode()
    assert 0 < watched.alarms["fell"] - changed[0] <= WITHIN
    assert watched.alarms.keys() == {"fell"}
    status = watched.statuses[-1][1]
    assert status.frozen_acceptance_length == status.recent_acceptance_length
    alerts(watched.statuses, "CoschedAcceptanceFell", tmp_path)


def alerts(statuses: list[tuple[int, Status]], alert: str, folder: Path) -> None:
    """Prometheus, given what ``/metrics`` would have shown at each look, raises that alert.

    Looks are a scrape apart here, and the last status stays for longer than any alert waits.
    """
    if PROMTOOL is None:
        return
    rules = ROOT / "configs" / "observability" / "alerts.yml"
    groups = yaml.safe_load(rules.read_text(encoding="utf-8"))["groups"]
    (rule,) = [r for group in groups for r in group["rules"] if r.get("alert") == alert]
    series: dict[str, list[int]] = {}
    for _, status in statuses:
        for name, label, value in samples(status):
            if name in {"alarm", "failed", "warned"}:
                of = 'instance="a"' if label is None else f'alarm="{label}", instance="a"'
                series.setdefault(f"cosched_{name}{{{of}}}", []).append(int(value))
    (asked,) = [name for name in series if _asks(rule["expr"], name)]
    labels = dict(part.split("=") for part in asked.partition("{")[2][:-1].split(", "))
    expected = {
        "exp_labels": {**rule["labels"], **{k: v.strip('"') for k, v in labels.items()}},
        "exp_annotations": {
            key: text.replace("{{ $labels.instance }}", "a")
            for key, text in rule["annotations"].items()
        },
    }
    test = {
        "interval": "15s",
        "input_series": [
            {"series": name, "values": " ".join(map(str, values)) + f" {values[-1]}x30"}
            for name, values in series.items()
        ],
        "alert_rule_test": [
            {"eval_time": "0m", "alertname": alert, "exp_alerts": []},
            {
                "eval_time": f"{15 * (len(statuses) + 30)}s",
                "alertname": alert,
                "exp_alerts": [expected],
            },
        ],
    }
    path = folder / "planted.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": [test]}))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _asks(expression: str, series: str) -> bool:
    """Whether a rule's expression is about that series."""
    name, _, labels = series.partition("{")
    if not expression.startswith(name):
        return False
    alarm = labels.partition('alarm="')[2].partition('"')[0]
    return not alarm or f'alarm="{alarm}"' in expression
