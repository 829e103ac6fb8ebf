"""Benchmarks in processes of their own are not measured by coverage, which would make them half as slow again."""

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def no_coverage_of_processes():
    started = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    yield
    if started is not None:
        os.environ["COVERAGE_PROCESS_CONFIG"] = started
