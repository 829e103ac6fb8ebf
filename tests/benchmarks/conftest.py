"""Coverage is switched off in the benchmarks' processes, which it would make 1.5 times as slow."""

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def no_coverage_of_processes():
    started = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    yield
    if started is not None:
        os.environ["COVERAGE_PROCESS_CONFIG"] = started
