"""Checks of the machine code of ``prediction_error``; no GPU is needed."""


def test_features_are_read_once_in_16_bytes_and_no_register_spills(compiled) -> None:
    for case, row in compiled("prediction_error").items():
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), case
        assert row["registers"] <= 255, case
        if "odd" not in case:
            m = int(case.split("-m")[1])
            assert row["loads_128"] == m + 1, case  # the history and the new feature
            assert row["loads"] == 2 * m + 2, case  # and as many scalars
