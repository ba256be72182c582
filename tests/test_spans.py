"""Spans of OpenTelemetry: what is in them, and that nothing of it is imported where nobody traces."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest

from cosched.build.embedded import build_arm
from cosched.loop.tee import Tee
from cosched.telemetry.spans import Spans
from tests.helpers.guarded_runs import Events, decode, world_of
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_updates_looks_and_publications_are_spans() -> None:
    """Of a run with a guard that scores, each event that took time is a span of that length, with its figures."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    events, world = Events(), world_of()
    decode(world, build_arm(world, "adapted", Tee(events, Spans(provider.get_tracer("test")))))
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
        seconds = span.attributes["cosched.seconds"]
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
    updates, looks = found["cosched.update"], found["cosched.guard"]
    results = [event["result"] for event in events.of("update")]
    assert [one.attributes["cosched.loss"] for one in updates] == [r.losses[0] for r in results]
    assert [one.attributes["cosched.seconds"] for one in updates] == [r.seconds for r in results]
    assert [one.attributes["cosched.action"] for one in looks] == [
        v.action for v in events.verdicts
    ]
    assert any(one.attributes["cosched.seconds"] > 0 for one in looks)
    versions = [event["version"].version for event in events.of("publication")]
    published = found.get("cosched.publish", [])
    assert [one.attributes["cosched.version"] for one in published] == versions != []


def test_who_cannot_export_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """The API promises not to raise; what is behind it may not know."""

    class Broken:
        asked = 0

        def start_span(self, *_: Any, **__: Any) -> Any:
            self.asked += 1
            raise RuntimeError("no collector")

    from cosched.records import WeightVersion

    tracer = Broken()
    spans = Spans(tracer)
    with caplog.at_level(logging.WARNING, "cosched"):
        for _ in range(3):
            spans.emit("publication", round=1, version=WeightVersion(1, "c", None, 0.1))
    assert [one.message for one in caplog.records] == ["cosched traces nothing more"]
    assert tracer.asked == 1


def told(code: str) -> list[str]:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_where_nobody_traces_nothing_is_imported() -> None:
    """A server without OpenTelemetry, or one that does not use it, has no part of it in memory."""
    code = (
        "import sys\nfrom cosched.telemetry.spans import tracer_there\n"
        "print(tracer_there(), *[name for name in sys.modules if 'opentelemetry' in name])"
    )
    assert told(code) == ["None"]


def test_the_provider_that_is_set_up_in_the_process_is_used() -> None:
    """As SGLang sets one up; the API alone, which is imported for other reasons too, traces nothing."""
    pytest.importorskip("opentelemetry.sdk.trace")
    code = (
        "from opentelemetry import trace\nfrom opentelemetry.sdk.trace import TracerProvider\n"
        "from cosched.telemetry.spans import tracer_there\nprint(tracer_there())\n"
        "trace.set_tracer_provider(TracerProvider())\nprint(tracer_there().start_span('x').is_recording())"
    )
    assert told(code) == ["None", "True"]
