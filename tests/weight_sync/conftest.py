"""Fixtures of tests/runtime that this folder uses as well: a Ray cluster for jobs to join."""

from tests.runtime.conftest import existing_cluster, ray_address

__all__ = ["existing_cluster", "ray_address"]
