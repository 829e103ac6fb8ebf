"""Checks of the machine code of ``kan_predict``; no GPU is needed."""

import os
import re
from dataclasses import dataclass

import pytest

ORDER = 3
VEC = {"bf16": 8, "fp16": 8, "fp32": 4}


@dataclass(frozen=True)
class Shape:
    """The parameters in the name of a case."""

    dtype: str
    window: int
    steps: int
    scaled: bool


@pytest.fixture
def predict(compiled):
    """The measured properties of ``predict_kernel``, by shape."""
    cases = {}
    for name, row in compiled("kan_predict").items():
        if found := re.fullmatch(r"(\w+) K=(\d+) P=(\d+) (\w+)", name):
            dtype, window, steps, scaled = found.groups()
            cases[Shape(dtype, int(window), int(steps), scaled == "scaled")] = row
    return cases


def test_no_register_spills_and_no_atomics(compiled) -> None:
    for name, row in compiled("kan_predict").items():
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), name


def test_no_shared_memory_is_used(predict) -> None:
    for shape, row in predict.items():
        assert row["shared"] == 0, shape


def test_registers_allow_enough_blocks(predict) -> None:
    """Maxima with Triton 3.7.1 on sm_80, 90 and 100: one step 80 (16 bits) and 52 (32 bits), six steps 208 and 96."""
    for shape, row in predict.items():
        wide, several = VEC[shape.dtype] == 8, shape.steps > 1
        bound = {(False, False): 80, (True, False): 120, (False, True): 144, (True, True): 255}[wide, several]
        assert row["registers"] <= bound, shape  # with 255, two blocks of 128 threads fit (65536 registers)


def test_tokens_are_read_16_bytes_at_a_time_and_once(predict) -> None:
    """The code loads features in two places: before the loop over the window, and in it for the next iteration."""
    for shape, row in predict.items():
        scale = shape.scaled * VEC[shape.dtype] * 4 // 16
        assert row["loads_128"] == 2 + scale, shape
        assert row["loads_narrow"] == 0, shape


def test_all_other_loads_are_of_coefficients(predict) -> None:
    """For each feature and open step: two scalars, and ORDER + 1 weights per element. A step has one bias."""
    for shape, row in predict.items():
        open_steps = (
            min(shape.window, shape.steps),
            min(shape.window, shape.steps - 1),
        )  # for a feature, for a prediction
        lookups = sum(open_steps) * (2 + (ORDER + 1) * VEC[shape.dtype])
        assert row["loads"] - row["loads_128"] == lookups + 1, shape


def test_predictions_are_written_16_bytes_at_a_time(predict) -> None:
    for shape, row in predict.items():
        assert row["stores"] == row["stores_128"] == 1, shape  # in the loop over the steps


def test_all_shipped_configurations_are_compiled(predict) -> None:
    shipped = {Shape(dtype, k, p, True) for dtype in VEC for k in (4, 8) for p in (1, 6)}
    if "LESA_GATE" not in os.environ:
        shipped -= {shape for shape in shipped if shape.dtype == "fp16" or (shape.window, shape.steps) == (4, 1)}
    assert shipped <= set(predict)


def test_a_loop_carries_the_same_values_for_every_dtype(compiled) -> None:
    """In float32 a feature needs no conversion. Triton must not take it for a constant of the loop for that."""
    rows = compiled("kan_predict")
    for case, row in rows.items():
        if case.startswith("fp32"):
            assert row["carried"] == rows[case.replace("fp32", "bf16")]["carried"], case
            assert row["carried"][0] >= 3, case  # sums, the arriving feature and the one before it
