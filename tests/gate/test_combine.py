"""Checks of the machine code of ``combine``; no GPU is needed."""

import re

import pytest

ROWS = {"bf16": 2, "fp16": 2, "fp32": 4}


@pytest.fixture
def forward(compiled):
    return {case: row for case, row in compiled("combine").items() if case.startswith("forward")}


@pytest.fixture
def dots(compiled):
    return {case: row for case, row in compiled("combine").items() if case.startswith("dots")}


def numbers(case: str) -> tuple[str, int, int]:
    """Layout, P and m."""
    _, _, layout, count, m, *_ = case.split("-")
    return layout, int(count[1:]), int(m[1:])


def test_no_register_spills_and_no_atomics(compiled) -> None:
    for case, row in compiled("combine").items():
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), case


def test_registers_allow_two_blocks_and_one_prediction_needs_few(forward, dots) -> None:
    for case, row in {**forward, **dots}.items():
        assert row["registers"] <= 255, (
            case
        )  # 176 at most with Triton 3.7.1; with 255, two blocks of 128 threads fit (65536 registers)
    assert (
        forward["forward-bf16-shared-P1-m8"]["registers"] <= 48
    )  # measured: 32, so that 16 blocks use all threads of an SM
    assert forward["forward-bf16-shared-P6-m8"]["registers"] <= 144  # measured: 96


def test_features_are_read_once_in_16_bytes_for_any_number_of_predictions(forward) -> None:
    for case, row in forward.items():
        layout, count, m = numbers(case)
        if layout != "channel" and not re.search("odd|m32", case):
            assert row["loads_128"] == m, case
            # the other loads are coefficients and biases, one scalar each
            assert row["loads"] == m + count * (m + 1), case
            assert row["loads_narrow"] == 0, case


def test_coefficients_of_channels_are_read_16_bytes_at_a_time(forward) -> None:
    for dtype, vectors in (
        ("bf16", 2),
        ("fp16", 2),
        ("fp32", 1),
    ):  # loads of float32 coefficients per load of the feature
        row = forward.get(f"forward-{dtype}-channel-P6-m8")
        if row or dtype != "fp16":  # fp16 is not always compiled
            assert row["loads"] == row["loads_128"] == 8 + vectors * 6 * (8 + 1)


def test_predictions_are_written_16_bytes_at_a_time(forward) -> None:
    for case, row in forward.items():
        _, count, _ = numbers(case)
        if not re.search("odd|m32|channel-P6-m16", case):
            assert row["stores_128"] == count, case
            assert row["stores"] == count, case


def test_many_features_are_read_at_least_4_bytes_at_a_time(forward) -> None:
    for case, accesses in (("forward-bf16-shared-P12-m32", 32 + 12 * 33), ("forward-bf16-channel-P6-m16", 16 + 6 * 17)):
        assert forward[case]["loads"] == accesses
        assert forward[case]["loads_narrow"] == 0


def test_dot_products_read_both_sides_once_and_16_bytes_at_a_time(dots) -> None:
    for case, row in dots.items():
        layout, count, m = numbers(case)
        if "odd" not in case:
            group = min(m, (4 if layout == "channel" else 48) // count)
            assert row["loads"] == row["loads_128"] == count + group, case
