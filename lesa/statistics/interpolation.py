"""Interpolation in time: what was measured at some noise levels, at others, since features are smooth in time."""

from typing import NamedTuple

import torch
from torch import Tensor

from lesa.tables.times import TOLERANCE, as_times, shown

NEIGHBOURS = 4  # a cubic through the nearest times


class Stencil(NamedTuple):
    """For each wanted step the measured steps next to it, ``nodes`` [steps', 4], and their ``weights`` [steps', 4]."""

    nodes: Tensor
    weights: Tensor

    @classmethod
    def between(cls, known: Tensor, wanted: Tensor) -> "Stencil":
        """Cubic interpolation from times ``known`` [steps + 1] at times ``wanted`` [steps' + 1].

        The last measured step stands for the times from soon after its own to the end of the schedule.

        Raises:
            ValueError: if a wanted time lies outside of the measured schedule.
        """
        known, wanted = as_times(known, len(known) - 1), as_times(wanted, len(wanted) - 1)[:-1]
        first = torch.cat([torch.tensor([True]), known[1:-1] < known[:-2]])  # solvers of second order repeat a time
        steps = first.nonzero().flatten()
        end, known = known[-1], known[steps]
        # The cubic is good for a gap before the first node, and for an eighth of one after the last; 6 evaluations of
        # the demo lose 0.5 dB if it is used for half a gap. Another resolution shifts a schedule by less.
        gap, late = known[:2].diff().abs().sum(), known[-2:].diff().abs().sum() / 8
        if wanted.max() > known.max() + TOLERANCE + gap or wanted.min() < end - TOLERANCE:
            raise ValueError(
                f"this calibration knows times from {float(known[0]):.4f} to {float(end):.4f}, the generation runs at "
                f"{shown(wanted.tolist())}; calibrate on its schedule"
            )
        wanted = wanted.clamp(min=known.min() - late)
        # two before and two after; for two times in one gap the same, so that only pairs near each other are needed
        count = min(NEIGHBOURS, len(known))
        after = torch.searchsorted(-known, -wanted, right=True)
        nodes = (after - count // 2).clamp(0, len(known) - count)[:, None] + torch.arange(count)
        near = known[nodes]
        others = ~torch.eye(near.shape[1], dtype=torch.bool)
        distance = torch.where(others, near[:, :, None] - near[:, None], 1.0)
        ratio = torch.where(others, (wanted[:, None, None] - near[:, None]) / distance, 1.0)
        return cls(steps[nodes], ratio.prod(-1))

    def one(self, values: Tensor) -> Tensor:
        """Values [steps] at the wanted times, [steps']."""
        return (values[self.nodes] * self.weights).sum(-1)

    def both(self, values: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Values [steps, steps, n] of two times, at wanted steps ``first`` and ``second`` [*pairs]: [*pairs, n]."""
        a, b = self.nodes[first], self.nodes[second]
        weights = self.weights[first][..., :, None] * self.weights[second][..., None, :]
        result = values.new_zeros(*first.shape, values.shape[-1])
        for i in range(a.shape[-1]):
            for j in range(b.shape[-1]):
                result += weights[..., i, j, None] * values[a[..., i], b[..., j]]
        return result
