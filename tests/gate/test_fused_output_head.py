"""Checks of the machine code of ``fused_output_head``; no GPU is needed."""

import os
from importlib.metadata import version

import pytest

# stores of a thread: predictions times blocks of outputs; a sum is one prediction, in float32
WIDE_STORES = {"flux-bf16": 6, "flux-own-bf16": 6, "one-bf16": 1, "flux-fp32": 6, "wide-bf16": 6}
WIDE_STORES |= {"sum-3-bf16": 2, "sum-8-bf16": 2, "sum-3-fp32": 1}


# Triton 3.6 makes other code of the largest kernels: it reads the modulation through shared memory too and spills.
TRITON_36 = version("triton").startswith("3.6.")
SPILLS = {"flux-bf16": (8, 2), "odd-bf16": (16, 11)} if TRITON_36 else {}  # bytes of the stack, instructions


@pytest.fixture
def rows(compiled):
    return compiled("fused_output_head")


def test_no_register_spills_and_no_atomics(rows) -> None:
    assert len(rows) == (28 if "LESA_GATE" in os.environ else 17)
    for case, row in rows.items():
        assert (row["stack"], row["spills"]) == SPILLS.get(case, (0, 0)), case
        assert row["atomics"] == 0, case


def test_sixteen_bit_features_are_projected_on_tensor_cores(rows) -> None:
    for case, row in rows.items():
        # float32 products do not use tensor cores
        assert (row["tensor_core"] > 0) == (not case.endswith("fp32")), case


@pytest.mark.skipif(TRITON_36, reason="the loads of Triton 3.7 and newer are counted")
def test_features_are_read_once_and_16_bytes_at_a_time(rows) -> None:
    stages = 3  # software pipelining: every load occurs once in the loop and twice before it
    cases = ("flux-bf16", 8, 64), ("dit-bf16", 8, 32), ("one-bf16", 1, 64), ("sum-3-bf16", 3, 64), ("sum-8-bf16", 8, 64)
    for case, m, outputs in cases:
        weights = outputs * 64 // (128 * 8)  # loads per thread for a block of 64 channels
        assert rows[case]["loads_128"] == stages * (m + weights), case
    own = rows["flux-own-bf16"]["loads_128"]  # a bf16 modulation is read in 16 bytes as well
    assert own == rows["flux-bf16"]["loads_128"] + stages * 6


def test_no_load_of_aligned_features_is_narrow(rows) -> None:
    for case, row in rows.items():
        assert (row["loads_narrow"] > 0) == case.startswith("odd"), case


def test_two_programs_share_a_multiprocessor(rows) -> None:
    """At most 255 registers let two programs of four warps fit; all GPUs since sm_80 have 99 KB of shared memory."""
    for case, row in rows.items():
        assert row["registers"] <= 255, case
        assert row["shared"] <= 99 * 1024, case
    assert 2 * rows["flux-bf16"]["shared"] <= 160 * 1024  # measured: 63 KB
    assert rows["dit-bf16"]["registers"] <= 224  # measured: 168
    assert rows["one-bf16"]["registers"] <= 112  # measured: 72
    assert rows["sum-3-bf16"]["registers"] <= 168  # so that three fit; measured: 128 to 168


def test_predictions_are_written_16_bytes_at_a_time(rows) -> None:
    for case, stores in WIDE_STORES.items():
        assert rows[case]["stores_128"] == rows[case]["stores"] == stores, case
