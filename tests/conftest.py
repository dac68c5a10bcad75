"""Environment that every test needs; set before torch, vLLM or Ray are imported."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with two, vLLM's CPU engine is ten times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Ray uses tokens in clusters that it starts itself and, from then on, in the whole process; the
# cluster of tests/runtime has none.
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture(autouse=True)
def what_is_logged_stays_visible():
    """The server of vLLM 0.25 raises the levels of all log handlers when it is imported."""
    root = logging.getLogger()
    before = [(one, one.level) for one in (root, *root.handlers)]
    yield
    for one, level in before:
        one.setLevel(level)
