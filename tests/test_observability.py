"""Dashboard, scrape configuration and alert rules, against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosched.engines.sglang.operators.metrics import METRICS, PREFIX, TIMES
from cosched.telemetry.alarms import ALARMS
from tests.helpers.paths import ROOT

FOLDER = ROOT / "configs" / "observability"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)"
)
COLUMNS = 24  # of Grafana's grid
NAME = re.compile(r"\bcosched[_:][a-z0-9_:]*[a-z0-9]\b")
LABELLED = re.compile(rf"({PREFIX}\w+)\{{([^}}]*)\}}")
SCRAPED = {"model_name", "instance", "job"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))


def asked_of_grafana() -> list[str]:
    """Every query of the dashboard: of panels, of marks on the time line, of variables."""
    board = dashboard()
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [mark["expr"] for mark in board["annotations"]["list"]]
    queries += [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    return queries


def asked() -> list[str]:
    return [rule["expr"] for rule in rules()] + asked_of_grafana()


@pytest.mark.parametrize("query", asked())
def test_every_metric_that_is_asked_for_is_one_that_we_show(query: str) -> None:
    """A metric that was renamed makes a dark panel and an alert that never comes, and nobody notices."""
    shown = {one.shown_as for one in METRICS} | {r["record"] for r in rules() if "record" in r}
    names = set(NAME.findall(query))
    assert names
    assert names <= shown


@pytest.mark.parametrize("query", asked())
def test_every_label_that_is_asked_for_is_one_that_it_has(query: str) -> None:
    """A label that a metric has not matches nothing."""
    own = {one.shown_as: {one.label} - {None} for one in METRICS}
    for name, matchers in LABELLED.findall(query):
        labels = set(re.findall(r"(\w+)\s*[=!]~?", matchers))
        assert labels <= own[name] | SCRAPED, name
        for value in re.findall(r'alarm="(\w+)"', matchers):
            assert value in ALARMS
        for values in re.findall(r'kind=~"([\w|]+)"', matchers):
            assert set(values.split("|")) <= set(TIMES)
    for labels in re.findall(r"\bby \(([^)]*)\)", query):
        assert set(re.split(r",\s*", labels)) <= {one.label for one in METRICS} | SCRAPED


def test_every_alarm_has_an_alert() -> None:
    """What the server concludes must reach somebody; failed and warned have gauges of their own."""
    text = "\n".join(rule["expr"] for rule in rules() if "alert" in rule)
    alerted = set(re.findall(r'alarm="(\w+)"', text)) | set(re.findall(r"cosched_(failed|warned)", text))  # fmt: skip
    assert alerted == set(ALARMS)


def test_an_alert_says_what_to_do_with_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at night: no key in it may be gone."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    from settings_page import key_paths

    page = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    for rule in rules():
        if "alert" not in rule:
            continue
        about = rule["annotations"]
        assert about["summary"]
        assert about["description"].endswith(".")
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert f"`{rule['alert']}`" in page, "docs/watching.md does not say what to do"
        keys = re.findall(r"\badapt(?:\.[a-z_]+)+", about["description"])
        assert set(keys) <= set(key_paths())


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Unique numbers, a grid without overlaps, and a data source that is chosen when it is imported."""
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert board["schemaVersion"] >= 36
    for panel in panels:
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= COLUMNS
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    variables = {one["name"] for one in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__all"}
    assert used <= variables


def run_promtool(*words: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *words], capture_output=True, text=True, timeout=60, cwd=FOLDER
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_takes_the_files(words: tuple[str, ...]) -> None:
    """As Prometheus reads them, and the alerts come and go as their tests say."""
    run_promtool(*words)


@needs_promtool
def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """Grafana shows a query that is wrong as a panel without data."""
    queries = [query for query in asked_of_grafana() if not query.startswith("label_values")]
    made = [{"record": f"q{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": made}]}))
    run_promtool("check", "rules", str(path))
