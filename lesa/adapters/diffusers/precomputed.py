"""Precomputed outputs: of all predicted steps until the next full one, in one pass over the kept features."""

from typing import Any

import torch
from torch import Tensor, nn

from lesa.adapters.diffusers.output_heads import Arguments, Modulation, OutputHead, norm_eps
from lesa.adapters.diffusers.step_clock import StepInfo
from lesa.runtime.transfer import to_device
from lesa.tables.memory import IntervalPrediction
from lesa_kernels import fused_output_head

# Up to this many elements, scale and shift of all steps of a generation are computed at once: 40 small operators for a
# generation, not for each interval. For more, skipping the full steps and staying in the processor's cache is faster.
MODULATION_ELEMENTS = 1 << 18
SUBSTEP_MODULATION_ELEMENTS = 1 << 21  # no substep is skipped, and the correction needs each twice


class PrecomputedOutputs:
    """The outputs of one branch by step.

    They are valid under the conditions of the call that they were computed at and for the transformer as it was then;
    the owner drops them when these change.

    Args:
        transformer: the module.
        output_head: its known end.
    """

    def __init__(self, transformer: nn.Module, output_head: OutputHead) -> None:
        self._transformer = transformer
        self._head = output_head
        self._outputs: dict[int, Tensor] = {}
        self._modulation: tuple[int, Modulation] | None = None  # of all steps from this one on

    def holds(self, step: int) -> bool:
        """Whether the output of this step was computed."""
        return step in self._outputs

    def take(self, step: int) -> Tensor:
        """The output of this step; it can be taken once."""
        return self._outputs.pop(step)

    def compute(self, arguments: Arguments, info: StepInfo, predicted: IntervalPrediction) -> None:
        """The outputs of all predicted steps of an interval, in one allocation."""
        tokens = self._tokens(arguments, info, predicted)
        parts = [self._head.unpack(self._transformer, arguments, part) for part in tokens.unbind(0)]
        self._outputs = dict(zip(predicted.steps, parts, strict=True))

    def sum(self, arguments: Arguments, info: StepInfo, predicted: IntervalPrediction) -> Tensor:
        """The weighted sum of the outputs of some substeps."""
        return self._head.unpack(self._transformer, arguments, self._tokens(arguments, info, predicted))

    def _tokens(self, arguments: Arguments, info: StepInfo, predicted: IntervalPrediction) -> Tensor:
        projection: Any = getattr(self._transformer, self._head.projection)
        return fused_output_head(
            predicted.history,
            predicted.coefficients,
            predicted.bias,
            *self._modulations(arguments, info, predicted),
            projection.weight,
            projection.bias,
            eps=norm_eps(self._transformer),
            means=predicted.means,
            centred=predicted.centred,
            weights=predicted.weights,
        )

    def _modulations(self, arguments: Arguments, info: StepInfo, predicted: IntervalPrediction) -> Modulation:
        """Multiplier and addend [steps, B or 1, D]."""
        given, steps = arguments["timestep"], predicted.steps
        if info.timesteps is None and predicted.substeps is None:
            return self._head.modulation(self._transformer, arguments, given.reshape(1, -1))
        if self._modulation is not None:
            first, (multiplier, addend) = self._modulation
            if steps[0] >= first:
                part = slice(steps[0] - first, steps[-1] + 1 - first)
                return multiplier[part], addend[part]
        # the correction needs the substeps of this step again
        begin = steps[0] if predicted.substeps is None else min(steps[0], predicted.substeps.first[info.step])
        times = to_device(self._times(info, predicted)[begin:].unsqueeze(1), given.device, given.dtype)
        if self._head.time_unit == 1:
            times = times / 1000  # pipelines divide after rounding to the dtype of the latents
        batch, channels = len(arguments["hidden_states"]), self._transformer.get_submodule(self._head.projection)
        elements = len(times) * batch * channels.in_features  # type: ignore[operator]
        if elements <= (MODULATION_ELEMENTS if predicted.substeps is None else SUBSTEP_MODULATION_ELEMENTS):
            self._modulation = begin, self._head.modulation(self._transformer, arguments, times)
            return self._modulations(arguments, info, predicted)
        return self._head.modulation(self._transformer, arguments, times[steps[0] - begin :][: len(steps)])

    def _times(self, info: StepInfo, predicted: IntervalPrediction) -> Tensor:
        """The scheduler's timesteps of all steps; those of substeps on a line through the scheduler's."""
        if predicted.substeps is None:
            assert info.timesteps is not None
            return info.timesteps
        assert info.times is not None
        unit = info.values[0] / float(info.times[0]) if info.values else 1000.0
        return predicted.substeps.times[:-1] * unit


def one_step(prediction: Tensor, step: int) -> IntervalPrediction:
    """A single prediction [*feature] as an interval of one step, with the coefficient 1."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return IntervalPrediction(
        [step], prediction.unsqueeze(0), torch.ones(1, 1, dtype=exact, device=prediction.device), None
    )
