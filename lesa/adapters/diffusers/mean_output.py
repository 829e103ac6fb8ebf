"""The mean output over a step that is divided into substeps, and the correction of the steps before it."""

from collections.abc import Callable

import torch
from torch import Tensor

from lesa.tables.memory import IntervalPrediction, SubstepMemory

OutputSum = Callable[[IntervalPrediction], Tensor]  # the weighted sum of the outputs of substeps


class MeanOutput:
    """The mean outputs of one branch in one generation. The sampler moves by each times the length of its step.

    It keeps up to three outputs: the true ones of the last two full steps, and what was sent since the last one.
    """

    def __init__(self) -> None:
        self._true: list[tuple[float, Tensor]] = []  # the times and outputs of the last two full steps
        self._sent: Tensor | None = None  # what the sample was moved by since the last full step

    def full(self, output: Tensor, step: int, memory: SubstepMemory, outputs: OutputSum) -> Tensor:
        """The mean over a full step whose first substep gave ``output``; the feature of this step has been kept."""
        self._true = [*self._true[-1:], (_time(memory, step), output)]
        rest = memory.predict_rest(step) if memory.output_share < 1 else None
        mean = output
        if rest is not None:
            mean = torch.add(outputs(rest), output, alpha=memory.substeps.weights[step][0])
        mean = self._with_line(mean, step, memory)
        correction = self._correction(step, memory, outputs)
        self._sent = mean * memory.substeps.lengths[step]
        return mean if correction is None else torch.add(mean, correction, alpha=1 / memory.substeps.lengths[step])

    def predicted(self, step: int, memory: SubstepMemory, outputs: OutputSum) -> Tensor:
        """The mean over a predicted step."""
        mean = self._true[-1][1] if self._true else None
        if mean is None or memory.output_share < 1:
            predicted = memory.predict_interval(step)
            assert predicted is not None, "a predicted step has substeps"
            mean = outputs(predicted)
        mean = self._with_line(mean, step, memory)
        if self._sent is not None:
            self._sent = torch.add(self._sent, mean, alpha=memory.substeps.lengths[step])
        return mean

    def _with_line(self, mean: Tensor, step: int, memory: SubstepMemory) -> Tensor:
        """A share of the mean from the line through the last two true outputs."""
        if not memory.output_share or len(self._true) < 2:
            return mean
        (before, first), (latest, last) = self._true
        if before == latest:
            return mean
        line = torch.lerp(first, last, (before - memory.substeps.middles[step]) / (before - latest))
        return torch.lerp(mean, line, memory.output_share)

    def _correction(self, step: int, memory: SubstepMemory, outputs: OutputSum) -> Tensor | None:
        """What the sample is to be moved by: the path since the full step before, interpolated, less what was sent."""
        if self._sent is None or not memory.correction or not memory.substeps.lengths[step] or len(self._true) < 2:
            return None
        (before, first), (latest, last) = self._true
        path = (first + last) * ((before - latest) / 2)
        if memory.output_share < 1:
            again = memory.interpolate(step)
            if again is None:
                return None
            path = torch.lerp(outputs(again), path, memory.output_share)
        return (path - self._sent) * memory.correction


def _time(memory: SubstepMemory, step: int) -> float:
    return float(memory.substeps.times[memory.substeps.first[step]])
