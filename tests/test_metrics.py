"""Metrics: names as Prometheus wants them, bounded labels, and what a status says on the page."""

from __future__ import annotations

import re
import shutil
import subprocess
import time

import msgspec
import prometheus_client as client
import pytest

from cosched.engines.sglang.operators.metrics import METRICS, PREFIX, Metrics, samples
from cosched.engines.sglang.worker.operator import Status
from cosched.records import RoundRow
from cosched.telemetry.alarms import ALARMS, alarms
from cosched.telemetry.metrics import POSITION_EDGES
from cosched.telemetry.tally import MOST_PLACES, VERSIONS_KEPT, Tally
from tests.helpers.serving import STATUS, busy

PROMTOOL = shutil.which("promtool")
KINDS_OF_TIME = 6
MOST_DRAFTED = 16  # tokens of a block
SHOWN_SECONDS = 0.005  # a hundredth of the half second between two


def said(status: Status) -> dict[str, dict[str | None, float]]:
    found: dict[str, dict[str | None, float]] = {}
    for name, label, value in samples(status):
        assert label not in found.setdefault(name, {}), "one value for each series"
        found[name][label] = value
    return found


def page(status: Status) -> str:
    """The page as Prometheus' client writes it, without the client."""
    lines, values = [], said(status)
    for one in METRICS:
        lines += [f"# HELP {one.shown_as} {one.about}", f"# TYPE {one.shown_as} {one.kind}"]
        for label, value in values.get(one.name, {}).items():
            more = "" if label is None else f',{one.label}="{label}"'
            lines.append(f'{one.shown_as}{{model_name="m"{more}}} {float(value)}')
    return "\n".join(lines) + "\n"


def test_every_sample_is_of_a_metric_and_has_its_label() -> None:
    """A name that is not declared would stop training in a server: the worker's own error."""
    declared = {one.name: one for one in METRICS}
    values = said(busy())
    assert values.keys() == declared.keys()
    for name, series in values.items():
        has_label = declared[name].label is not None
        assert {label is not None for label in series} == {has_label}, name


def test_names_are_as_prometheus_wants_them() -> None:
    """One prefix, no colon (those are for recording rules), base units in plural, _total by the client."""
    assert len({one.name for one in METRICS}) == len(METRICS)
    for one in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", one.name), one.name
        assert not one.name.endswith(("_total", "_ms", "_mb", "_count")), one.name
        assert one.about.endswith(".")
        assert one.shown_as.startswith(PREFIX)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_own_linter_finds_nothing() -> None:
    """Types, help texts, units and suffixes, by the tool that Prometheus comes with."""
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=page(busy()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_figures_by_place_depth_and_version_are_those_of_the_status() -> None:
    """What is asked for by PromQL is what cosched top shows."""
    status = busy()
    values, figures = said(status), status.figures
    assert sum(values["request_rounds"].values()) == figures.total.rounds == 600
    assert sum(values["committed_tokens"].values()) == figures.total.committed
    assert values["reached_drafts"]["2"] == figures.total.places[1].reached
    assert values["accepted_drafts"]["3"] == figures.total.places[2].accepted
    assert values["version_number"] == {"0": 5, "1": 4, "2": 3, "3": 2, "4": 1, "loaded": 0}
    assert values["version_request_rounds"]["loaded"] == 100
    assert values["alarm"] == {name: name == "place" for name in ALARMS}
    assert values["guard_log_wealth_bound"] == {"better": 1.6, "worse": 3.0}


def test_what_is_not_known_is_left_out() -> None:
    """A loss of 0 or an estimate of 0 would be a lie on a dashboard."""
    values = said(msgspec.structs.replace(STATUS, last_loss=None, acceptance_length=None))
    assert "last_loss" not in values
    assert "acceptance_length_tokens" not in values
    assert "frozen_acceptance_length_tokens" not in values
    assert "guard_log_wealth" not in values
    assert values["failed"] == {None: False}


def test_a_server_that_runs_for_months_has_no_more_series_than_one_that_has_just_begun() -> None:
    """Every version, a place for each of 200 drafts and every depth: the labels stay few."""
    tally = Tally(lambda: 0.0)
    for version in range(2000):
        tally.observe(RoundRow("r", version * 50, version, 200, 199, 200))
    drafted = tuple(range(MOST_DRAFTED + 1))
    status = msgspec.structs.replace(busy(), figures=tally.figures(), rounds_by_drafted=drafted)
    number = sum(len(series) for series in said(status).values())
    labelled = len(ALARMS) + 2 * len(POSITION_EDGES) + 2 * MOST_PLACES + 3 * (VERSIONS_KEPT + 1)
    assert number <= len(METRICS) + labelled + KINDS_OF_TIME + len(drafted) + 4


def test_to_show_a_status_takes_less_than_a_hundredth_of_the_time_between_two() -> None:
    """Figures, alarms and samples after many rounds: the best of ten. Counting itself is in test_tally."""
    tally = Tally(lambda: 0.0)
    for number in range(20_000):
        accepted = number * 7 % 5 % 4
        tally.observe(RoundRow("r", number % 2000, number // 500, 3, accepted, accepted + 1))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        figures = tally.figures()
        status = msgspec.structs.replace(STATUS, figures=figures, alarms=alarms(figures))
        assert len(list(samples(status))) > 50
        best = min(best, time.perf_counter() - started)
    assert best < SHOWN_SECONDS


def test_the_client_shows_what_a_status_says_and_counters_only_rise() -> None:
    """Through Prometheus' own client, as in a server."""
    registry = client.CollectorRegistry()
    metrics = Metrics("m", registry=registry)
    metrics.show(busy())
    metrics.show(msgspec.structs.replace(busy(), updates=9))
    shown = client.generate_latest(registry).decode()
    expected = {line for line in page(msgspec.structs.replace(busy(), updates=9)).splitlines()
                if not line.startswith("#")}  # fmt: skip
    values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
    for line in expected:
        name, value = line.rsplit(" ", 1)
        labels = ",".join(sorted(re.findall(r'\w+="[^"]*"', name)))
        found = values[f"{name.partition('{')[0]}{{{labels}}}"]
        assert float(found) == pytest.approx(float(value)), line
    # What is not known any more does not stay as it was.
    metrics.show(msgspec.structs.replace(busy(), frozen_acceptance_length=None))
    shown = client.generate_latest(registry).decode()
    assert 'cosched_frozen_acceptance_length_tokens{model_name="m"} NaN' in shown


def test_replicas_are_told_apart_as_sglang_tells_its_own() -> None:
    registry = client.CollectorRegistry()
    Metrics("m", replica=1, registry=registry).show(busy())
    shown = client.generate_latest(registry).decode()
    assert 'cosched_draft_version{dp_rank="1",model_name="m"}' in shown
    assert 'place="1"' in shown
