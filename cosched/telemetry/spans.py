"""An update, a look of the guard and a publication as spans of OpenTelemetry, where somebody traces.

Who traces has set up a provider in this process: SGLang with ``--enable-trace``, or
``opentelemetry-instrument`` by the standard variables (``OTEL_EXPORTER_OTLP_ENDPOINT`` and the like). Nothing
of OpenTelemetry is imported here: what nobody has imported traces nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

logger = logging.getLogger("cosched")

TRACE = "opentelemetry.trace"


def tracer_there() -> Any:
    """A tracer of the provider that is set up in this process; None where there is none."""
    trace: Any = sys.modules.get(TRACE)
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer("cosched")


class Spans:
    """A sink that ends a span with each event that took time, and began so many seconds before.

    An update in the background has ended some time before the round that finds it done.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer: Any = tracer

    def emit(self, kind: str, **fields: Any) -> None:
        if self._tracer is None:
            return
        match kind:
            case "update":
                done = fields["result"]
                more = {
                    "loss": done.losses[0],
                    "steps": done.num_steps,
                    "skipped_steps": done.num_skipped,
                    "rows": done.num_rows,
                }
                self._span("update", done.seconds, fields["round"], more)
            case "verdict":
                verdict = fields["verdict"]
                more = {
                    "action": verdict.action,
                    "reason": verdict.reason,
                    "evidence_better": verdict.evidence_better,
                    "evidence_worse": verdict.evidence_worse,
                }
                self._span("guard", fields["seconds"], fields["round"], more)
            case "publication":
                version = fields["version"]
                self._span(
                    "publish", version.seconds, fields["round"], {"version": version.version}
                )
            case _:
                pass

    def _span(self, name: str, seconds: float, round_: int, more: dict[str, Any]) -> None:
        now = time.time_ns()
        known = {"round": round_, "seconds": seconds, **more}
        attributes = {f"cosched.{key}": value for key, value in known.items() if value is not None}
        began = now - int(1e9 * seconds)
        try:
            span = self._tracer.start_span(
                f"cosched.{name}", start_time=began, attributes=attributes
            )
            span.end(end_time=now)
        except Exception:  # who exports may be anything, and learning must not end of it
            self._tracer = None
            logger.warning("cosched traces nothing more", exc_info=True)
