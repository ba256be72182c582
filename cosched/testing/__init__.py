"""Contract tests for all that plugins can be, ours and anybody's (needs pytest).

A file of three lines runs them::

    from cosched.testing import DrafterContract

    class TestMyDrafter(DrafterContract):
        names = ("my_drafter",)

Without ``names`` everything that is registered is tested. The long cells are marked ``slow``, which
a project with ``--strict-markers`` has to list among its markers.
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "adapters",
            "choosing",
            "drafters",
            "learning",
            "lengths",
            "losses",
            "objectives",
            "policies",
            "sampling",
            "serving",
        )
    )
)

from cosched.testing.drafters import DrafterContract  # noqa: E402  what it asserts is rewritten
from cosched.testing.lengths import LengthContract  # noqa: E402
from cosched.testing.losses import LossContract  # noqa: E402
from cosched.testing.objectives import ObjectiveContract  # noqa: E402
from cosched.testing.policies import PolicyContract  # noqa: E402

__all__ = [
    "DrafterContract",
    "LengthContract",
    "LossContract",
    "ObjectiveContract",
    "PolicyContract",
]
