"""Outputs made ahead: all predicted steps until the next full one, in one pass over the kept features."""

from typing import Any

import torch
from torch import Tensor, nn

from lesa.adapters.diffusers.clock import Moment
from lesa.adapters.diffusers.endings import Arguments, Ending, norm_eps
from lesa.runtime.driver import Call, Coming
from lesa_kernels import head

CHANGING = ("hidden_states", "timestep")  # new at every step; no output that was made ahead depends on the latents


class Ahead:
    """Outputs by step for one branch, handed out only while they are still true.

    They were made from the conditioning tensors of one call. A callback may replace the prompt or write into it, so
    identity and version of every such tensor are compared before an output is given away.
    """

    def __init__(self, call: Call, arguments: Arguments, outputs: dict[int, Tensor]) -> None:
        self._generation = call.generation
        self._signature = call.signature
        self._conditions = _conditions(arguments)
        self._outputs = outputs

    def holds(self, call: Call) -> bool:
        """Whether the output of this step was made."""
        return call.generation is self._generation and call.step in self._outputs

    def is_true_for(self, call: Call, arguments: Arguments) -> bool:
        """Whether it was made from these shapes and these conditions."""
        if call.signature != self._signature:
            return False
        now = _conditions(arguments)
        return len(now) == len(self._conditions) and all(
            a is b and version == then for (a, version), (b, then) in zip(now, self._conditions, strict=True)
        )

    def take(self, call: Call) -> Tensor:
        """The output of this step, once."""
        return self._outputs.pop(call.step)


def make_outputs(
    transformer: nn.Module, ending: Ending, arguments: Arguments, moment: Moment, coming: Coming
) -> dict[int, Tensor]:
    """The transformer's outputs at the coming steps, in one allocation."""
    given: Tensor = arguments["timestep"]
    if len(coming.steps) == 1:
        times = given.reshape(1, -1)
    else:
        assert moment.timesteps is not None, "only a scheduler tells what comes"
        times = moment.timesteps[coming.steps[0] : coming.steps[-1] + 1].unsqueeze(1).to(given.device, given.dtype)
        if ending.time_unit == 1:
            times = times / 1000  # as pipelines do, after rounding to the dtype of the latents
    multiplier, addend = ending.modulation(transformer, arguments, times)
    projection: Any = getattr(transformer, ending.projection)
    tokens = head(
        coming.history,
        coming.coefficients,
        coming.bias,
        multiplier,
        addend,
        projection.weight,
        projection.bias,
        eps=norm_eps(transformer),
        means=coming.means,
    )
    outputs = [ending.unpack(transformer, arguments, part) for part in tokens.unbind(0)]
    return dict(zip(coming.steps, outputs, strict=True))


def _conditions(arguments: Arguments) -> list[tuple[Tensor, int]]:
    return [(v, _version(v)) for k, v in arguments.items() if isinstance(v, Tensor) and k not in CHANGING]


def _version(tensor: Tensor) -> int:
    """Counts writes into a tensor; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def one_step(prediction: Tensor, step: int) -> Coming:
    """A prediction that is there already, as a combination of itself."""
    ones = torch.ones(1, 1, dtype=torch.promote_types(prediction.dtype, torch.float32), device=prediction.device)
    return Coming([step], prediction.unsqueeze(0), ones, None, None)
