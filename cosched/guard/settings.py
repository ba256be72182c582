"""``adapt.guard``: what a guard may be told. It is no plugin, so its settings lie beside it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta


class FiniteSettings(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="finite"
):
    """``adapt.guard`` of ``kind: finite``: updates none of whose steps was finite are refused."""


Rate = Annotated[float, Meta(gt=0, lt=1)]


class ShadowSettings(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="shadow",
):
    """``adapt.guard`` of ``kind: shadow``: drafts are scored on rows that no update has seen.

    What is learnt serves, from update to update, once there is evidence that it is better than the
    draft as loaded; ``false_publish`` is the chance that learning which is not better ever serves. The
    draft as loaded serves again once there is evidence that what was learnt is worse than it;
    ``false_rollback`` is the chance that such evidence is wrong. Both hold however often is looked
    (``cosched.guard.statistics``). Here to serve takes surer evidence than to go back, because the draft
    as loaded is what users had before; what a file gets that says nothing is in
    ``schedulers/defaults.py``. With state per request the evidence is of all requests.

    Each update leaves out the newest ``anchors``, which judge it; later ones are trained on them.
    Between updates the guard looks every ``check_rounds`` on all rows that no update has had, up to
    four times ``anchors``, or sooner when the acceptance length has fallen; a quarter as often while
    the draft as loaded serves, which can do no harm. When the draft as loaded
    serves again nothing is trained for ``check_rounds``, and for twice as many each time until
    learning has been shown to pay, but never for more than 32 times as many.
    """

    replaced: ClassVar[dict[str, str]] = {
        "every": "anchors (each update is judged)",
        "tolerance": "false_publish",
        "patience": "false_rollback",
        "alarm_tokens": "check_rounds",
        "check_every": "check_rounds",
        "confidence": "false_publish",
        "doubt": "false_rollback",
        "trials": "adapt.policy (what to spend on a candidate)",
        "prospect_rows": "adapt.policy (what to spend on a candidate)",
        "cooldown_rounds": "check_rounds",
        "prove_first": "kind: finite (to serve at once)",
    }
    anchors: Annotated[int, Meta(ge=1)] = 32
    check_rounds: Annotated[int, Meta(ge=1)] = 256
    false_publish: Rate = 0.05
    false_rollback: Rate = 0.2
