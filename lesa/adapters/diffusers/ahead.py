"""Outputs made ahead: all predicted steps until the next full one, in one pass over the kept features."""

from typing import Any

import torch
from torch import Tensor, nn

from lesa.adapters.diffusers.clock import Moment
from lesa.adapters.diffusers.endings import Arguments, Ending, Modulation, norm_eps
from lesa.runtime.driver import Coming
from lesa_kernels import head

# Up to this many numbers the scale and shift of all steps of a generation are made at once: 40 small operators a
# generation instead of an interval. Beyond, leaving out the full steps and staying in the cache is worth more.
MODULATION_ELEMENTS = 1 << 18


class Ahead:
    """The outputs of one branch by step.

    They belong to the conditions of the call that they were made at, and to a transformer as it was then: whoever
    keeps them drops them when these change.

    Args:
        transformer: the module.
        ending: how it ends.
    """

    def __init__(self, transformer: nn.Module, ending: Ending) -> None:
        self._transformer = transformer
        self._ending = ending
        self._outputs: dict[int, Tensor] = {}
        self._modulation: tuple[int, Modulation] | None = None  # of all steps from the given one on

    def holds(self, step: int) -> bool:
        """Whether the output of this step was made."""
        return step in self._outputs

    def take(self, step: int) -> Tensor:
        """The output of this step, once."""
        return self._outputs.pop(step)

    def make(self, arguments: Arguments, moment: Moment, coming: Coming) -> None:
        """The outputs at the coming steps, in one allocation."""
        projection: Any = getattr(self._transformer, self._ending.projection)
        tokens = head(
            coming.history,
            coming.coefficients,
            coming.bias,
            *self._modulations(arguments, moment, coming.steps),
            projection.weight,
            projection.bias,
            eps=norm_eps(self._transformer),
            means=coming.means,
            centred=coming.centred,
        )
        parts = [self._ending.unpack(self._transformer, arguments, part) for part in tokens.unbind(0)]
        self._outputs = dict(zip(coming.steps, parts, strict=True))

    def _modulations(self, arguments: Arguments, moment: Moment, steps: list[int]) -> Modulation:
        """Multiplier and addend [steps, B or 1, D]."""
        given: Tensor = arguments["timestep"]
        if moment.timesteps is None:
            return self._ending.modulation(self._transformer, arguments, given.reshape(1, -1))
        if self._modulation is not None:
            first, (multiplier, addend) = self._modulation
            part = slice(steps[0] - first, steps[-1] + 1 - first)
            return multiplier[part], addend[part]
        times = moment.timesteps[steps[0] :].unsqueeze(1).to(given.device, given.dtype)
        if self._ending.time_unit == 1:
            times = times / 1000  # as pipelines do, after rounding to the dtype of the latents
        batch, channels = len(arguments["hidden_states"]), self._transformer.get_submodule(self._ending.projection)
        if len(times) * batch * channels.in_features <= MODULATION_ELEMENTS:  # type: ignore[operator]
            self._modulation = steps[0], self._ending.modulation(self._transformer, arguments, times)
            return self._modulations(arguments, moment, steps)
        return self._ending.modulation(self._transformer, arguments, times[: len(steps)])


def one_step(prediction: Tensor, step: int) -> Coming:
    """A prediction that was made one step at a time, with an identity coefficient."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return Coming([step], prediction.unsqueeze(0), torch.ones(1, 1, dtype=exact, device=prediction.device), None)
