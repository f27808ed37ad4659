"""The order of the tests: what takes minutes first, or one worker ends with it alone."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The zoo, then everything else as it was."""
    items.sort(key=lambda item: item.path.name != "test_zoo.py")
