"""Kept features on a GPU: nothing waits, a graph replays a generation, and it takes the bytes that it should."""

import functools

import pytest
import torch

from lesa import StepPlan, Taylor
from lesa.runtime.buffer_layout import BufferLayout
from lesa.runtime.history import FeatureHistory
from tests.native.conftest import no_host_wait

PLAN = StepPlan.paper(16, 5)
TIMES = torch.linspace(1, 0, 17, dtype=torch.float64)
FEATURE = (1, 256, 384)


def features() -> list[torch.Tensor]:
    return [torch.randn(FEATURE, device="cuda").bfloat16() for _ in range(PLAN.num_steps)]


@pytest.fixture
def layouts():
    """One layout for all generations, as an accelerator has."""
    return functools.lru_cache(BufferLayout)


def generation(table, layouts, given) -> torch.Tensor:
    history = FeatureHistory(table, make_layout=layouts)
    predicted = []
    for step, feature in enumerate(given):
        if PLAN.is_full(step):
            history.keep(step, feature)
        else:
            predicted.append(history.predict(step))
    return torch.stack(predicted)


def test_a_second_generation_does_not_make_the_host_wait(layouts):
    table, given = Taylor(2).table(PLAN, TIMES), features()
    first = generation(table, layouts, given)
    with no_host_wait():
        second = generation(table, layouts, given)
    assert torch.equal(first, second)


def test_the_first_generation_does_not_wait_either(layouts):
    table, given = Taylor(2).table(PLAN, TIMES), features()
    generation(table, BufferLayout, given)  # the kernels are compiled
    with no_host_wait():
        generation(table, layouts, given)


def test_a_graph_replays_a_whole_generation_with_new_features(layouts):
    table, given = Taylor(2).table(PLAN, TIMES), features()
    generation(table, layouts, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = generation(table, layouts, given)
    fresh = features()
    for old, new in zip(given, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(result, generation(table, layouts, fresh))


def test_features_kept_on_one_stream_are_read_on_another(layouts):
    table, given = Taylor(2).table(PLAN, TIMES), features()
    expected = generation(table, layouts, given)
    history, predicted = FeatureHistory(table, make_layout=layouts), []
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for step, feature in enumerate(given):
        ours, other = streams[step % 2], streams[(step + 1) % 2]
        ours.wait_stream(other)
        with torch.cuda.stream(ours):
            if PLAN.is_full(step):
                history.keep(step, feature)
            else:
                predicted.append(history.predict(step))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(torch.stack(predicted), expected)


def test_an_interval_allocates_its_kept_features_and_one_prediction(layouts):
    table, given = Taylor(2).table(PLAN, TIMES), features()
    generation(table, layouts, given)
    torch.cuda.synchronize()
    size, rows = given[0].nbytes, FeatureHistory(table, make_layout=layouts).num_rows
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    history = FeatureHistory(table, make_layout=layouts)
    for step, feature in enumerate(given):
        history.keep(step, feature) if PLAN.is_full(step) else history.predict(step)
    peak = torch.cuda.max_memory_allocated() - before
    means = 4 * size // (2 * FEATURE[-1])  # float32 a token, of one feature
    assert rows * size <= peak <= (rows + 1) * size + (rows + 2) * means + (1 << 16)
