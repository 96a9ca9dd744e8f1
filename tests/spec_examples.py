"""Tables of job files with every key."""

import pytest

from ntkdask.errors import UserError
from ntkdask.jobs.spec import build_job


def table(**sections):
    """The tables of a small job, sections replaced."""
    return {
        "name": "small",
        "data": {"url": "d.zarr", "split": {"test": 0.2}},
        "network": {"preset": "fully_connected", "depth": 1},
        "features": {"type": "NTKRandomFeatures", "n_components": 64},
        **sections,
    }


def refusal(**sections) -> str:
    with pytest.raises(UserError) as found:
        build_job(table(**sections))
    assert found.value.exit_code == 2
    return str(found.value)
