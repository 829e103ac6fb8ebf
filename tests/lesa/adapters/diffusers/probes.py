"""Probes of a transformer: which blocks run, which features enter the head, and how many operators a call needs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa import StepPlan
from lesa.adapters.diffusers import Attachment
from lesa.adapters.diffusers.recorder import Observer
from lesa.runtime.driver import Driver
from tests.lesa.adapters.diffusers.tiny import STEPS, generate

PLAN = StepPlan(STEPS, [0, 1, 4, 7])


class BlockRuns:
    """Counts forwards of anything inside any block, independently of the hooks under test."""

    def __init__(self, transformer):
        self.count = 0
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            for module in block.modules():
                if module is not block:
                    module.register_forward_pre_hook(self._tick)

    def _tick(self, *_):
        self.count += 1


class Oracle(Driver):
    """Runs the full steps of a plan and predicts the others with the recorded features of an earlier generation."""

    def __init__(self, features, plan):
        self.features, self.plan, self.call = features, plan, None

    def begin(self, call):
        self.call = call
        return not self.plan.is_full(call.step)

    def predict(self, head):
        return self.features[self.call.branch, self.call.step].clone()

    def end(self, *, failed):
        assert not failed


def record(pipeline, **options):
    """The features of a generation by (branch, step), and its result."""
    features = {}
    with Attachment(pipeline, Observer(lambda call, f: features.__setitem__((call.branch, call.step), f.clone()))):
        result = generate(pipeline, **options)
    return features, result


def call_at(transformer, time, batch=2, **changes):
    """One call of a bare transformer."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(batch, 16, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 8, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": time.float().expand(batch),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return transformer(**inputs | changes).sample


def assert_predicted_paths_agree(loop, name, forecasters, plan, step_by_step, monkeypatch):
    """Assert that precomputed outputs, skipped blocks and a driver that predicts step by step give equal outputs."""
    with lesa.enable(loop, forecasters, plan) as handle:
        precomputed = loop()
    assert handle.records[0].predicted == list(plan.predicted_steps)
    monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
    with lesa.enable(loop, forecasters, plan):
        blocks_skipped = loop()
    with Attachment(loop, step_by_step):
        expected = loop()
    precision = 1e-4 if name == "wan" else 1e-9  # Wan's own final norm computes in float32
    for step in range(plan.num_steps):
        tolerance = precision * float(expected[step].abs().max())
        torch.testing.assert_close(precomputed[step], expected[step], rtol=0, atol=tolerance)
        torch.testing.assert_close(blocks_skipped[step], expected[step], rtol=0, atol=tolerance)


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators_of(loop, forecasters, plan, monkeypatch):
    """The number of operators in each call of the enabled transformer of a loop."""
    counts = []
    with lesa.enable(loop, forecasters, plan):
        enabled = loop.transformer.__class__.__call__

        def counted(self, **kwargs):
            with Operators() as operators:
                result = enabled(self, **kwargs)
            counts.append(operators.count)
            return result

        monkeypatch.setattr(type(loop.transformer), "__call__", counted)
        loop()
    return counts
