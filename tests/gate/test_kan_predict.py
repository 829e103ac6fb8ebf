"""What the machine code of ``kan_predict`` shows, where no GPU is needed to see it."""

import pytest

from tests.gate.kan_predict import ORDER, VEC, cases


@pytest.fixture
def predict(compiled):
    """(constants of the case, what its code shows), case by case."""
    constants = {case.name: case.constants | {"scaled": "scale" in case.types} for case in cases()}
    return {name: (constants[name], row) for name, row in compiled("kan_predict").items() if name != "fold"}


def test_nothing_leaves_the_registers_and_nothing_is_atomic(compiled) -> None:
    for name, row in compiled("kan_predict").items():
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), name


def test_elements_share_nothing(predict) -> None:
    for name, (_, row) in predict.items():
        assert row["shared"] == 0, name


def test_registers_leave_room_for_two_blocks_and_one_step_is_small(predict) -> None:
    for name, (constants, row) in predict.items():
        # 208 with six sums of 8 elements, 80 with one, at most, in Triton 3.7.1; 65536 / 128 / 255 = 2 blocks
        assert row["registers"] <= (255 if constants["P"] > 1 else 120), name


def test_tokens_are_read_16_bytes_at_a_time_and_once(predict) -> None:
    """A feature is loaded in two places, before the loop over the window and for the next one in it."""
    for name, (constants, row) in predict.items():
        scale = constants["scaled"] * constants["VEC"] * 4 // 16
        assert row["loads_128"] == 2 + scale, name
        assert row["loads_narrow"] == 0, name


def test_all_other_loads_are_of_the_table(predict) -> None:
    """A feature looks up two scalars and ORDER + 1 weights an element for every open step; a step has one bias."""
    for name, (constants, row) in predict.items():
        window, steps, vec = constants["K"], constants["P"], constants["VEC"]
        among_features, among_predictions = min(window, steps), min(window, steps - 1)
        look_ups = (among_features + among_predictions) * (2 + (ORDER + 1) * vec)
        assert row["loads"] - row["loads_128"] == look_ups + 1, name


def test_predictions_are_written_16_bytes_at_a_time(predict) -> None:
    for name, (_, row) in predict.items():
        assert row["stores"] == row["stores_128"] == 1, name  # in the loop over the steps


def test_all_shipped_configurations_are_compiled(predict) -> None:
    shipped = {(dtype, k, p) for dtype in VEC for k in (4, 8) for p in (1, 6)}
    assert shipped <= {(name.split()[0], constants["K"], constants["P"]) for name, (constants, _) in predict.items()}
