"""Output errors: the error of the output if feature j is used at step s, and the inner products of these errors.

With the norm statistics and modulation of step s fixed, the output is linear in the input of the final layer norm. Let
``z_j = (feature_j - mean) / std_s``, and ``x = z_s``. If feature j is used at step s, it has

    length  a_sj = <x, z_j> / D                                    along x; the norm scales it back to 1
    error   y_sj = ((z_j - a_sj x) * multiplier_s) @ weight.T      orthogonal to x, in units of the output

So a prediction ``sum_j c_j feature_j`` has the error ``sum_j c_j y_sj / sum_j c_j a_sj``, to first order. Without the
derivative of the norm, ``- a_sj x``, the demo's images lose up to 4 dB.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.statistics.gram import GramMatrix
from lesa.statistics.interpolation import NEIGHBOURS, Stencil
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable
from lesa.tables.times import as_times

CHUNK = 1 << 12  # output values that are converted to float64 at once
END = 5  # weight of the end, relative to a full step; from 3 to 10 the demo's images agree within 0.4 dB on average
LATER = NEIGHBOURS - 1  # features of so many later steps are measured too, for interpolation between steps
EXACT = 1e-10  # of the largest squared error; what is smaller is left out. The ridge of the forecasters is 1e-6


class LinearHead(NamedTuple):
    """The end of a transformer at one step, without what it adds: ``norm(feature) * multiplier @ weight.T``.

    multiplier [B or 1, D], weight [O, D], eps of the norm.
    """

    multiplier: Tensor
    weight: Tensor
    eps: float


@dataclass(eq=False)
class OutputErrorGram:
    """The output errors ``y_sj`` of all pairs of steps as short vectors with the same inner products.

    The errors of a model with 50 steps span some 100 to 200 dimensions, since features are smooth functions of time.

    Attributes:
        vectors: [steps, steps, rank] float64; ``<vectors[s, i], vectors[t, j]>`` is the sum of ``<y_si, y_tj>`` over
            output values. Pairs with j > s + 3 are not measured and zero.
        lengths: sums [steps, steps] float64 of ``a_sj``.
        squares: sums [steps] float64 of the squared outputs.
        count: output values in the sums.
        tokens: tokens in the sums.
        stencil: where these are the errors of another schedule, how they follow from those above.
    """

    vectors: Tensor
    lengths: Tensor
    squares: Tensor
    count: float
    tokens: float
    stencil: Stencil | None = None
    _products: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def num_steps(self) -> int:
        """Steps of the schedule."""
        return len(self.squares) if self.stencil is None else len(self.stencil.nodes)

    @classmethod
    def empty(cls, num_steps: int) -> "OutputErrorGram":
        """Nothing counted yet."""
        vectors, lengths, squares = (
            torch.zeros(shape, dtype=torch.float64)
            for shape in ((num_steps, num_steps, 0), (num_steps,) * 2, num_steps)
        )
        return cls(vectors, lengths, squares, count=0.0, tokens=0.0)

    @classmethod
    def from_gram(cls, gram: GramMatrix) -> "OutputErrorGram":
        """Errors of the features themselves, ``y_sj = feature_j - feature_s``, for an unknown output head."""
        features, count = _factor(gram.matrix[:-1, :-1]), float(gram.count)
        lengths = torch.full((gram.num_steps,) * 2, count, dtype=torch.float64)
        squares = gram.matrix.diagonal()[:-1].clone()
        return cls(features - features[:, None], lengths, squares, count=count, tokens=count)

    def at(self, known: Tensor, wanted: Tensor) -> "OutputErrorGram":
        """These errors, measured at times ``known`` [steps + 1], for another schedule ``wanted`` [steps' + 1].

        Both variables are interpolated, so the schedule may be much finer.

        Raises:
            ValueError: if it reaches outside of the measured times.
        """
        return dataclasses.replace(self, stencil=Stencil.between(known, wanted))

    def within(self, first: int, num_steps: int) -> "OutputErrorGram":
        """These errors in a longer schedule of ``num_steps`` steps, in which they begin at step ``first``.

        The other steps cost nothing. A step of these that is predicted from a step before ``first``, where this stream
        has no feature, counts as if nothing were predicted, so that plans make a step of these full first.
        """
        if (first, num_steps) == (0, self.num_steps) and self.stencil is None:
            return self
        target, used = pairs(self.num_steps)
        part, squares = slice(first, first + self.num_steps), self.power * self.count
        vectors = torch.zeros(num_steps, num_steps, self.vectors.shape[-1] + 1, dtype=torch.float64)
        vectors[target + first, used + first, :-1] = self.of(target, used) * self.count**0.5
        vectors[part, :first, -1] = squares.sqrt().unsqueeze(1)
        lengths = torch.full((num_steps,) * 2, self.tokens, dtype=torch.float64)  # as long as they should be
        lengths[target + first, used + first] = self.length(target, used) * self.tokens
        all_squares = squares.mean().repeat(num_steps)
        all_squares[part] = squares
        return OutputErrorGram(vectors, lengths, all_squares, self.count, self.tokens)

    def merge(self, other: "OutputErrorGram") -> None:
        """Add the counts of another one; a ValueError for another number of steps."""
        if other.num_steps != self.num_steps:
            raise ValueError(f"cannot merge errors of {other.num_steps} and {self.num_steps} steps")
        other = other.within(0, other.num_steps)
        vectors = torch.cat([self.vectors, other.vectors], -1).flatten(0, 1)
        self.vectors = _shortened(vectors).unflatten(0, self.vectors.shape[:2])
        self._products = None
        self.lengths = self.lengths + other.lengths
        self.squares = self.squares + other.squares
        self.count += other.count
        self.tokens += other.tokens

    def of(self, target: Tensor, used: Tensor) -> Tensor:
        """The vectors [*pairs, rank] of pairs of steps; their inner products are means over output values."""
        found = self.vectors[target, used] if self.stencil is None else self.stencil.both(self.vectors, target, used)
        mean: Tensor = found / self.count**0.5
        return mean

    def products(self, target: Tensor, used: Tensor) -> Tensor:
        """Inner products [..., n, n] of the errors of pairs j < s, [..., n] each, as means over output values.

        Those on the measured schedule are computed once, since the search of plans needs them thousands of times.
        """
        if self.stencil is not None:
            vectors = self.of(target, used)
            return vectors @ vectors.mT
        if self._products is None:
            every = self.of(*pairs(self.num_steps))
            self._products = every @ every.T
        row = target * (target - 1) // 2 + used
        found: Tensor = self._products[row.unsqueeze(-1), row.unsqueeze(-2)]
        return found

    def length(self, target: Tensor, used: Tensor) -> Tensor:
        """``a_sj``, the mean over tokens."""
        if self.stencil is None:
            return self.lengths[target, used] / self.tokens
        return self.stencil.both(self.lengths[..., None], target, used)[..., 0] / self.tokens

    @property
    def power(self) -> Tensor:
        """The mean square [steps] of the output."""
        squares = self.squares if self.stencil is None else self.stencil.one(self.squares).clamp(min=0)
        mean: Tensor = squares / (self.count or 1.0)
        return mean

    def errors(self, table: CoefficientTable) -> Tensor:
        """Inner products [steps, steps] of the output errors of a table; zero at full steps.

        The diagonal holds the mean squared error of each step.

        Raises:
            ValueError: for a table of another number of steps, or if nothing has been counted.
        """
        self.check(table.plan)
        vectors = torch.zeros(self.num_steps, self.vectors.shape[-1], dtype=torch.float64)
        for row, step in zip(table.coefficients, table.plan.predicted_steps, strict=True):
            used = torch.tensor([f for f in table.plan.full_steps if f < step])
            target, row = torch.full_like(used, step), row[: len(used)]
            # clamp: the linearisation fails when coefficients cancel
            vectors[step] = row @ self.of(target, used) / (row @ self.length(target, used)).clamp(min=1e-3)
        return vectors @ vectors.T

    def check(self, plan: StepPlan) -> None:
        """Raises a ValueError if a plan has another number of steps or nothing has been counted."""
        if plan.num_steps != self.num_steps:
            raise ValueError(f"the plan has {plan.num_steps} steps, this calibration {self.num_steps}")
        if self.count == 0:
            raise ValueError("nothing has been counted: no batch has been completed")


def pairs(num_steps: int) -> tuple[Tensor, Tensor]:
    """All (s, j) with j < s."""
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
    steps = len(features)
    exact = torch.promote_types(features[0].dtype, torch.float32)
    centred = torch.stack([feature.detach().to(exact) for feature in features])
    centred -= centred.mean(-1, keepdim=True)
    errors: list[Tensor] = []  # of each step s, [measured j, B T O]
    measured: list[tuple[int, int]] = []
    lengths, squares = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for step, head in enumerate(heads):
        x = centred[step] * (centred[step].square().mean(-1, keepdim=True) + head.eps).rsqrt()
        scale = x.square().sum(-1) / centred[step].square().sum(-1).clamp(min=torch.finfo(exact).tiny)  # 1 / std**2
        weight = (head.weight * head.multiplier.unsqueeze(1)).to(exact).transpose(1, 2)  # [B or 1, D, O]
        own = x @ weight  # [B, T, O]
        others = [j for j in range(min(steps, step + LATER + 1)) if j != step]
        used = centred[others] * scale.sqrt().unsqueeze(-1)
        length = torch.linalg.vecdot(used, x) / x.shape[-1]  # [j, B, T]
        errors.append((used @ weight - length.unsqueeze(-1) * own).flatten(1))
        measured += [(step, j) for j in others]
        lengths[step, others] = length.sum((1, 2), dtype=torch.float64).cpu()
        lengths[step, step] = x.square().mean(-1).sum(dtype=torch.float64).cpu()
        squares[step] = own.square().sum(dtype=torch.float64).cpu()
    factor = _factor(_products(torch.cat(errors)))
    vectors = torch.zeros(steps, steps, factor.shape[-1], dtype=torch.float64)
    if measured:
        target, used_steps = torch.tensor(measured).T
        vectors[target, used_steps] = factor
    return OutputErrorGram(vectors, lengths, squares, count=float(own.numel()), tokens=float(own[..., 0].numel()))


def _products(rows: Tensor) -> Tensor:
    """The inner products [n, n] of rows [n, values] in float64, on the host."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(CHUNK, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total.cpu()


def _factor(products: Tensor) -> Tensor:
    """Vectors [n, rank] with these inner products [n, n], as few dimensions as keep them to ``EXACT``.

    Cholesky with pivots: each dimension is the row whose square is explained worst so far.
    """
    left = products.diagonal().clone()
    vectors = products.new_zeros(len(products), len(products))
    least = EXACT * float(left.max()) if len(left) else 0.0
    rank = 0
    while rank < len(left) and float(left.max()) > least:
        pivot = int(left.argmax())
        known = vectors[:, :rank]
        vectors[:, rank] = (products[pivot] - known @ known[pivot]) / left[pivot].sqrt()
        left = left - vectors[:, rank].square()
        left[pivot] = 0
        rank += 1
    return vectors[:, :rank].clone()


def _shortened(vectors: Tensor) -> Tensor:
    """The same inner products in as few dimensions as keep them to ``EXACT``, [n, rank]."""
    if not vectors.numel():
        return vectors[:, :0]
    values, axes = torch.linalg.eigh(vectors.T @ vectors)
    shortened: Tensor = vectors @ axes[:, values > EXACT * vectors.square().sum(-1).max()]
    return shortened
