"""Compiled transformers: all graphs are made in the first generation, and a predicted step has no graph break."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import lesa
from lesa import Taylor
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.probes import PLAN
from tests.lesa.adapters.diffusers.tiny import generate


def regional(pipeline, backend):
    """Compile the repeated blocks."""
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


def in_place(pipeline, backend):
    """Compile the transformer in place."""
    pipeline.transformer.compile(fullgraph=True, backend=backend)


def wrapped(pipeline, backend):
    """Replace the transformer by a compiled wrapper."""
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend=backend)


@pytest.fixture(autouse=True)
def reset_dynamo():
    """Start and end each test without compiled graphs."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "when"),
    [(regional, "before"), (regional, "after"), (in_place, "before"), (in_place, "after"), (wrapped, "before")],
)
def test_nothing_is_compiled_after_the_first_generation(pipeline, predicted_path, how, when):
    with lesa.enable(tiny.pipeline(), Taylor(1), PLAN) as handle:
        expected = generate(tiny.pipeline())
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = generate(pipeline)
    backend = CompileCounterWithBackend("eager")
    if when == "before":
        how(pipeline, backend)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        if when == "after":
            how(pipeline, backend)
        torch.testing.assert_close(generate(pipeline), expected)
        graphs = backend.frame_count
        for seed in (0, 1):
            generate(pipeline, seed=seed, guidance=3.0)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
    assert backend.frame_count == graphs > 0
    assert not counters["graph_break"]
    if predicted_path == "output head known":  # as many graphs as without lesa
        assert graphs == (3 if how is regional else 1)


def test_compiling_an_enabled_transformer_raises_with_what_to_do_instead(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        wrapped(pipeline, "eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.compile\(transformer\) before lesa.enable"):
            generate(pipeline)
