"""What tests share, by subject: builders, fakes, and assertions of several lines.

Test files import these and never one another. Fixtures are in ``conftest.py``.
"""

import pkgutil

import pytest

# An assert in here shows its values, as one in a test does.
pytest.register_assert_rewrite(
    *(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__))
)
