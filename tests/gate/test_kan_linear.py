"""Checks of the machine code of ``kan_linear``; no GPU is needed."""

from importlib.metadata import version
from typing import Any

import pytest

# With Triton 3.7.1 for sm_80, 90 and 100 the tensor-core kernels use 71 to 210 registers per thread, the others up to
# 157. ptxas spills above 255; below 256 a program of 256 threads fits on an SM.
REGISTERS = 240
HOPPER_REGISTERS = 255  # still one program of 256 threads
TRITON_36 = version("triton").startswith("3.6.")
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # code for sm_80 also runs on smaller GPUs than an A100
TENSOR_CORE = ("large", "medium", "dx", "dw")


@pytest.fixture
def capability(request: pytest.FixtureRequest) -> int:
    return request.node.callspec.params["compiled"]


@pytest.fixture
def cases(compiled) -> dict[str, Any]:
    return compiled("kan_linear")


def on_tensor_cores(name: str) -> bool:
    return name.startswith("hopper") or (name.startswith(TENSOR_CORE) and not name.endswith("fp32"))


def test_no_register_spills(cases):
    assert {name for name, code in cases.items() if code["stack"] or code["spills"]} == set()


def test_registers_and_shared_memory_are_within_limits(cases, capability):
    for name, code in cases.items():
        assert code["registers"] <= (HOPPER_REGISTERS if name.startswith("hopper") else REGISTERS), name
        assert code["shared"] <= SHARED[capability], name


def test_large_16_bit_products_run_on_tensor_cores(cases):
    """float32 products do not use tensor cores, except on Hopper, and neither do kernels for few rows."""
    for name, code in cases.items():
        assert (code["tensor_core"] > 0) == on_tensor_cores(name), name


def test_no_atomics(cases, capability):
    for name, code in cases.items():
        # On sm_100, tensor-core memory is allocated and freed with four atomics on shared memory.
        assert code["atomics"] == (4 if capability == 100 and on_tensor_cores(name) else 0), name


def test_accesses_are_of_16_bytes(cases):
    """Of weights, dy and results. Only tiles of x with few inputs per row are narrower, and at least 4 bytes."""
    for name, code in cases.items():
        if "odd" in name or (TRITON_36 and name == "dw-spline-fp32"):  # 3.6 reads it 4 bytes at a time
            continue
        if name.startswith("one-row"):
            assert code["loads"] - code["loads_128"] <= 1, name  # a thread reads one element of x
            continue
        assert code["loads_narrow"] == 0, name
        assert code["loads_128"] >= 0.5 * code["loads"], name
        if not name.removeprefix("hopper-").startswith(("few-rows", "dx")):
            assert code["stores_128"] == code["stores"], name


def test_weights_are_read_in_16_bytes_for_any_number_of_inputs(cases):
    """The 8 weights of an input take 16 bytes, so that reads are aligned for the 51 inputs of LESA's gate, too."""
    spline_loads = 4 * 512 // 128 // 8  # a tile of 4 outputs and 512 weights, read by 128 threads
    found = {name: code["loads_128"] for name, code in cases.items() if name.startswith("few-rows-odd")}
    assert "few-rows-odd-bf16" in found
    assert set(found.values()) == {spline_loads}
