"""Whether a candidate may serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.records import UpdateResult, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class FiniteGuard:
    """Refuses an update none of whose steps was taken; DeepSpeed has skipped the non-finite ones."""

    def judge(self, result: UpdateResult, candidate: Mapping[str, Tensor]) -> Verdict:  # noqa: ARG002
        if result.num_skipped == result.num_steps:
            return Verdict(publish=False, reason="every step was non-finite and skipped")
        return Verdict(publish=True, reason="finite")
