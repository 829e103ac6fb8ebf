"""Output errors: the error of the output if feature j is used at step s, and the inner products of these errors.

With the norm statistics and modulation of step s fixed, the output is linear in the input of the final layer norm. Let
``z_j = (feature_j - mean) / std_s``, and ``x = z_s``. If feature j is used at step s, it has

    length  a_sj = <x, z_j> / D                                    along x; the norm scales it back to 1
    error   y_sj = ((z_j - a_sj x) * multiplier_s) @ weight.T      orthogonal to x, in units of the output

So a prediction ``sum_j c_j feature_j`` has the error ``sum_j c_j y_sj / sum_j c_j a_sj``, to first order. Without the
derivative of the norm, ``- a_sj x``, the demo's images lose up to 4 dB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.statistics.gram import GramMatrix
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable
from lesa.tables.times import as_times

CHUNK = 1 << 12  # output values that are converted to float64 at once
MOST_STEPS = 100  # their pairs take 0.2 GB and the search of plans a minute; both grow with the 4th power of the steps
END = 5  # weight of the end, relative to a full step; from 3 to 10 the demo's images agree within 0.4 dB on average


class LinearHead(NamedTuple):
    """The end of a transformer at one step, without what it adds: ``norm(feature) * multiplier @ weight.T``.

    multiplier [B or 1, D], weight [O, D], eps of the norm.
    """

    multiplier: Tensor
    weight: Tensor
    eps: float


@dataclass
class OutputErrorGram:
    """``matrix[(s, i), (t, j)] = <y_si, y_tj>``, a mean over output values, for all features i < s and j < t.

    Attributes:
        num_steps: steps of the schedule.
        matrix: sums [pairs, pairs] float64; the pair (s, j) is row ``s (s - 1) / 2 + j``.
        lengths: sums [steps, steps] float64 of ``a_sj``.
        power: sums [steps] float64 of the squared outputs.
        count: output values in the sums.
        tokens: tokens in the sums.
    """

    num_steps: int
    matrix: Tensor
    lengths: Tensor
    power: Tensor
    count: float
    tokens: float

    @classmethod
    def empty(cls, num_steps: int) -> "OutputErrorGram":
        """Nothing counted yet."""
        check_steps(num_steps)
        pairs = num_steps * (num_steps - 1) // 2
        matrix, lengths, power = (
            torch.zeros(shape, dtype=torch.float64) for shape in ((pairs, pairs), (num_steps,) * 2, (num_steps,))
        )
        return cls(num_steps, matrix, lengths, power, count=0.0, tokens=0.0)

    @classmethod
    def from_gram(cls, gram: GramMatrix) -> "OutputErrorGram":
        """Errors of the features themselves, ``y_sj = feature_j - feature_s``, for an unknown output head."""
        check_steps(gram.num_steps)
        features = gram.matrix[:-1, :-1]
        target, used = pairs(gram.num_steps)
        matrix = (
            features[used][:, used]
            - features[used][:, target]
            - features[target][:, used]
            + features[target][:, target]
        )
        count = float(gram.count)
        lengths = torch.full((gram.num_steps,) * 2, count, dtype=torch.float64)
        return cls(gram.num_steps, matrix, lengths, features.diagonal().clone(), count=count, tokens=count)

    def within(self, first: int, num_steps: int) -> "OutputErrorGram":
        """These errors in a longer schedule of ``num_steps`` steps, in which they begin at step ``first``.

        The other steps cost nothing. A step of these that is predicted from a step before ``first``, where this stream
        has no feature, counts as if nothing were predicted, so that plans make a step of these full first.
        """
        if (first, num_steps) == (0, self.num_steps):
            return self
        made = OutputErrorGram.empty(num_steps)
        target, used = pairs(self.num_steps)
        row = made.row(target + first, used + first)
        made.matrix[row[:, None], row] = self.matrix
        made.lengths.fill_(self.tokens)  # as long as they should be
        made.power.fill_(float(self.power.mean()))
        target, used = pairs(num_steps)
        before = (target >= first) & (target < first + self.num_steps) & (used < first)
        made.matrix.diagonal()[before] = self.power[target[before] - first]
        part = slice(first, first + self.num_steps)
        made.lengths[part, part], made.power[part] = self.lengths, self.power
        made.count, made.tokens = self.count, self.tokens
        return made

    def merge(self, other: "OutputErrorGram") -> None:
        """Add the counts of another one; a ValueError for another number of steps."""
        if other.num_steps != self.num_steps:
            raise ValueError(f"cannot merge errors of {other.num_steps} and {self.num_steps} steps")
        self.matrix += other.matrix
        self.lengths += other.lengths
        self.power += other.power
        self.count += other.count
        self.tokens += other.tokens

    def row(self, target: Tensor, used: Tensor) -> Tensor:
        """The rows of pairs (target, used)."""
        return target * (target - 1) // 2 + used

    def length(self, target: Tensor, used: Tensor) -> Tensor:
        """``a_sj``, the mean over tokens."""
        return self.lengths[target, used] / self.tokens

    def errors(self, table: CoefficientTable) -> Tensor:
        """Inner products [steps, steps] of the output errors of a table; zero at full steps.

        The diagonal holds the mean squared error of each step.

        Raises:
            ValueError: for a table of another number of steps, or if nothing has been counted.
        """
        self.check(table.plan)
        weights = torch.zeros(self.num_steps, len(self.matrix), dtype=torch.float64)
        for row, step in zip(table.coefficients, table.plan.predicted_steps, strict=True):
            used = torch.tensor([f for f in table.plan.full_steps if f < step])
            target = torch.full_like(used, step)
            length = row[: len(used)] @ self.length(target, used)
            # clamp: the linearisation fails when coefficients cancel
            weights[step, self.row(target, used)] = row[: len(used)] / length.clamp(min=1e-3)
        return weights @ self.matrix @ weights.T / self.count

    def check(self, plan: StepPlan) -> None:
        """Raises a ValueError if a plan has another number of steps or nothing has been counted."""
        if plan.num_steps != self.num_steps:
            raise ValueError(f"the plan has {plan.num_steps} steps, this calibration {self.num_steps}")
        if self.count == 0:
            raise ValueError("nothing has been counted: no batch has been completed")


def check_steps(num_steps: int) -> None:
    """Raise a ValueError for more steps than can be calibrated, before memory is allocated for all their pairs."""
    if num_steps > MOST_STEPS:
        raise ValueError(
            f"a calibration has at most {MOST_STEPS} steps, not {num_steps}: it holds a number for each two pairs of "
            "them; calibrate with fewer steps and sample with as many"
        )


def pairs(num_steps: int) -> tuple[Tensor, Tensor]:
    """All (s, j) with j < s, in the order of the rows."""
    target, used = torch.tril_indices(num_steps, num_steps, offset=-1)
    return target, used


def path_weights(plan: StepPlan, times: Tensor, weight: float) -> Tensor:
    """The weight of the product of the errors of two steps, [steps, steps].

    An error moves the sample by the length of its step. It counts once at its own step. At every later full step, which
    runs on the moved sample, the sum of all errors so far counts ``weight`` times, and ``END`` times that at the end.
    """
    times = as_times(times, plan.num_steps)
    length = times[:-1] - times[1:]
    step = torch.arange(plan.num_steps)
    later = torch.maximum(step[:, None], step)
    seen = (torch.tensor(plan.full_steps) > later[..., None]).sum(-1) + END
    return (weight * seen + torch.eye(plan.num_steps)).double() * length[:, None] * length


@torch.no_grad()
def measure_output_errors(features: Sequence[Tensor], heads: Sequence[LinearHead]) -> OutputErrorGram:
    """The output errors of one batch of samples, from the features [B, T, D] and the output heads of all its steps."""
    errors: list[Tensor] = []  # of each step s, [s, B T O]
    made = OutputErrorGram.empty(len(features))
    exact = torch.promote_types(features[0].dtype, torch.float32)
    centred = features[0].new_empty(len(features), *features[0].shape, dtype=exact)
    for step, (feature, head) in enumerate(zip(features, heads, strict=True)):
        feature = feature.detach().to(exact)
        feature = centred[step] = feature - feature.mean(-1, keepdim=True)
        x = feature * (feature.square().mean(-1, keepdim=True) + head.eps).rsqrt()
        scale = x.square().sum(-1) / feature.square().sum(-1).clamp(min=torch.finfo(exact).tiny)  # 1 / std**2, [B, T]
        weight = (head.weight * head.multiplier.unsqueeze(1)).to(exact).transpose(1, 2)  # [B or 1, D, O]
        own = x @ weight  # [B, T, O]
        earlier = centred[:step] * scale.sqrt().unsqueeze(-1)
        length = torch.linalg.vecdot(earlier, x) / x.shape[-1]  # [s, B, T]
        errors.append((earlier @ weight - length.unsqueeze(-1) * own).flatten(1))
        made.lengths[step, :step] = length.sum((1, 2), dtype=torch.float64).cpu()
        made.power[step] = own.square().sum(dtype=torch.float64).cpu()
    made.count, made.tokens = float(own.numel()), float(own[..., 0].numel())
    together = torch.cat(errors)
    total = torch.zeros(len(together), len(together), dtype=torch.float64, device=together.device)
    for part in together.split(CHUNK, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    made.matrix = (total.tril() + total.tril(-1).T).cpu()  # exactly symmetric, which a matrix product need not be
    return made
