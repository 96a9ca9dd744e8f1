"""Tests marked `gpu` run where there is one; elsewhere they are skipped, and the reason says why."""

import pytest

from ntkdask import arrays


def pytest_collection_modifyitems(items):
    usable, reason = arrays.gpu_status()
    if not usable:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
