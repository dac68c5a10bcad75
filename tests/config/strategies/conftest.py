"""The strategy file that the tests of this directory change."""

from pathlib import Path

import pytest

from tests.config.strategy_job import JOB


@pytest.fixture
def job(write) -> Path:
    """A small strategy file without errors and without notices."""
    return write("job.yaml", JOB)
