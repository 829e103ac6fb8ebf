"""What the machine code of ``head`` shows, where no GPU is needed to see it."""

import pytest

from tests.gate.head import cases

CASES = {case.name: case.constants for case in cases()}
STAGES = 2  # of three, before the loop; with the loop itself a block of features is fetched at three places


@pytest.fixture
def rows(compiled):
    return compiled("head")


def test_nothing_leaves_the_registers_and_nothing_is_atomic(rows) -> None:
    assert rows.keys() == CASES.keys()
    for case, row in rows.items():
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), case


def test_sixteen_bit_features_are_projected_on_tensor_cores(rows) -> None:
    for case, row in rows.items():
        # float32 is multiplied in float32
        assert (row["tensor_core"] > 0) == (not case.endswith("fp32")), case


def test_features_are_read_once_and_16_bytes_at_a_time(rows) -> None:
    for case in ("flux-bf16", "flux-own-bf16", "dit-bf16", "one-bf16"):
        row, c = rows[case], CASES[case]
        weights = c["OUTPUTS"] * c["CHANNELS"] // (128 * 8)
        fetched = (c["M"] + weights) * c["STAGES"]
        multipliers = c["GROUP"] * c["STAGES"] if case.startswith("flux-own") else 0
        assert fetched <= row["loads_128"] <= fetched + multipliers, case


def test_no_load_of_aligned_features_is_narrow(rows) -> None:
    for case, row in rows.items():
        assert (row["loads_narrow"] > 0) == case.startswith("odd"), case


def test_two_programs_share_a_multiprocessor(rows) -> None:
    """Four warps of 255 registers twice; shared memory within the 99 KB that all GPUs since sm_80 have."""
    for case, row in rows.items():
        assert row["registers"] <= 255, case
        assert row["shared"] <= 99 * 1024, case
    assert 2 * rows["flux-bf16"]["shared"] <= 160 * 1024  # 63 KB
    assert rows["dit-bf16"]["registers"] <= 224  # 168
    assert rows["one-bf16"]["registers"] <= 112  # 72


def test_predictions_are_written_16_bytes_at_a_time(rows) -> None:
    for case in ("flux-bf16", "flux-own-bf16", "one-bf16", "flux-fp32", "wide-bf16"):
        c = CASES[case]
        assert rows[case]["stores_128"] == rows[case]["stores"] == c["GROUP"] * c["OUTPUT_BLOCKS"], case
