"""Methods that take turns, step by step, in one process."""

import pytest

from benchmarks.turns import take_turns


def test_generators_are_interleaved_by_their_numbers_of_steps():
    seen = []

    def generation(name, steps):
        def run(step_done):
            for step in range(steps):
                seen.append((name, step))
                step_done()
            seen.append((name, "end"))

        return run

    turns = [("a", 2), ("b", 3), ("a", 1)]
    taken = take_turns({"a": generation("a", 3), "b": generation("b", 3)}, turns)
    assert seen[:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("a", 2)]
    assert sorted(seen[6:]) == [("a", "end"), ("b", "end")]
    assert [len(steps) for steps in taken] == [2, 3, 1]
    moments = [moment for steps in taken for step in steps for moment in step]
    assert moments == sorted(moments)


def test_an_exception_of_one_generator_ends_all():
    def fails(step_done):
        step_done()
        raise KeyError("lost")

    def waits(step_done):
        while True:
            step_done()

    with pytest.raises(KeyError, match="lost"):
        take_turns({"waits": waits, "fails": fails}, [("waits", 1), ("fails", 1), ("waits", 1), ("fails", 1)])
