"""Inner products of the features of all steps: all that a linear forecaster ever needs to know of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lesa.files import check_tensor, read_tensors, write_tensors
from lesa.files.tensors import damaged
from lesa.plan import StepPlan
from lesa.table import CoefficientTable
from lesa_kernels import gram_row

KIND = "Gram matrix"
RIDGE = 1e-6  # relative to the mean diagonal
CHUNK, CHANNELS = 1 << 21, 128  # elements of features that are widened to float64 at once, and their channels


class GramMatrix:
    """``G[i, j] = sum <feature_i, feature_j>`` over tokens, channels and samples, in float64 [steps + 1, steps + 1].

    The last row and column belong to the constant feature 1, so that a bias can be fitted. One matrix serves every
    plan: the best prediction of step s from the full steps A is ``G_AA^-1 G_As`` with squared error
    ``G_ss - G_sA G_AA^-1 G_As``.

    Args:
        num_steps: steps of the schedule.
        channels: length of the last axis of the features, to keep the inner products of each channel as well, for
            coefficients of its own; they are ``channels`` times the size. None: the sums over all channels alone.

    Attributes:
        matrix: float64 [steps + 1, steps + 1].
        by_channel: float64 [channels, steps + 1, steps + 1], which add up to ``matrix``; or None.

    Raises:
        ValueError: for less than one channel.
    """

    def __init__(self, num_steps: int, *, channels: int | None = None) -> None:
        if channels is not None and channels < 1:
            raise ValueError(f"features have at least 1 channel, not {channels}")
        self.num_steps = num_steps
        self.matrix = torch.zeros(num_steps + 1, num_steps + 1, dtype=torch.float64)
        self.by_channel: Tensor | None = None
        if channels is not None:
            self.by_channel = self.matrix.new_zeros(channels, num_steps + 1, num_steps + 1)
        self._forget()

    def _forget(self) -> None:
        self._pending = torch.zeros_like(self.matrix)
        self._features: Tensor | None = None  # of the batch so far, [steps, elements]
        self._next_step = 0

    def update(self, step: int, feature: Tensor) -> None:
        """Add a feature of the current batch of samples; step 0 begins a new batch, the last step counts it.

        A batch that is broken off leaves everything as it was.

        Raises:
            ValueError: if steps do not come in order, shapes change within a batch, the feature is not finite or has
                another number of channels.
        """
        if step == 0:
            self._forget()
        if step != self._next_step:
            raise ValueError(f"step {step} does not follow step {self._next_step - 1}; step 0 begins a new batch")
        if self.channels is not None and feature.shape[-1:] != (self.channels,):
            raise ValueError(f"the feature of step {step} is {list(feature.shape)}, not [..., {self.channels}]")
        flat = feature.detach().flatten()
        if self._features is None:
            self._features = flat.new_empty(self.num_steps, flat.numel())
        if self._features.shape[1] != flat.numel():
            raise ValueError(
                f"the feature of step {step} has {flat.numel()} elements, step 0 had {self._features.shape[1]}"
            )
        self._features[step] = flat
        self._next_step += 1
        row = gram_row(self._features[: step + 1], self._features[step]).cpu()
        if not bool(row.isfinite().all()):
            self._forget()
            raise ValueError(f"the feature of step {step} holds NaN or infinity; the batch is not counted")
        self._pending[step, : step + 1] = row
        self._pending[: step + 1, step] = row
        self._pending[step, -1] = self._pending[-1, step] = flat.sum(dtype=torch.float64).cpu()
        if step == self.num_steps - 1:
            self._pending[-1, -1] = flat.numel()
            self._count()

    def _count(self) -> None:
        """The batch is complete. All sums are made before the first of them is kept."""
        matrix, by_channel = self.matrix + self._pending, None
        if self.by_channel is not None:
            assert self._features is not None
            by_channel = self.by_channel + _products(self._features.unflatten(1, (-1, len(self.by_channel)))).cpu()
        self.matrix, self.by_channel = matrix, by_channel
        self._forget()

    def of_begun(self) -> "GramMatrix":
        """The matrix of the steps that the current batch has had so far, where the others will not come.

        Raises:
            ValueError: if there are none.
        """
        steps = self._next_step
        if steps == 0 or self._features is None:
            raise ValueError("no batch has begun")
        made = GramMatrix(steps, channels=self.channels)
        kept = [*range(steps), self.num_steps]
        made.matrix = self._pending[kept][:, kept].clone()
        made.matrix[-1, -1] = self._features[0].numel()
        if self.by_channel is not None:
            made.by_channel = _products(self._features[:steps].unflatten(1, (-1, len(self.by_channel)))).cpu()
        return made

    @property
    def channels(self) -> int | None:
        """How many have inner products of their own; None: those of each channel are not kept."""
        return None if self.by_channel is None else len(self.by_channel)

    @property
    def count(self) -> int:
        """Elements counted: samples x tokens x channels."""
        return int(self.matrix[-1, -1])

    def merge(self, other: "GramMatrix") -> None:
        """Add what another machine measured.

        Raises:
            ValueError: for another number of steps or channels.
        """
        if other.num_steps != self.num_steps:
            raise ValueError(f"cannot merge matrices of {other.num_steps} and {self.num_steps} steps")
        if other.channels != self.channels:
            raise ValueError(
                f"cannot merge matrices of {other.channels} and {self.channels} channels (None: only their sum is kept)"
            )
        self.matrix += other.matrix
        if self.by_channel is not None and other.by_channel is not None:
            self.by_channel += other.by_channel

    def solve(self, used: Sequence[int], target: int, *, ridge: float = RIDGE) -> Tensor:
        """Coefficients [used] of the best combination of steps ``used`` (``num_steps`` is the constant) for ``target``.

        Raises:
            ValueError: if nothing has been counted.
        """
        return self.solve_all(used, [target], ridge=ridge)[0]

    def solve_all(
        self, used: Sequence[int], targets: Sequence[int], *, ridge: float = RIDGE, per_channel: bool = False
    ) -> Tensor:
        """As :meth:`solve` for several steps at once, [targets, used]; for each channel, [targets, used, channels].

        Raises:
            ValueError: if nothing has been counted, or not by channel.
        """
        self._check_counted()
        matrix, index = self.products(per_channel=per_channel), torch.tensor(list(used))
        system = matrix[..., index, :][..., index]
        # The constant is scaled like the others, or its ridge would be one of another size.
        scale = system.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(torch.float64).tiny).sqrt().unsqueeze(-1)
        normal = system / scale.mT / scale + ridge * torch.eye(len(index), dtype=torch.float64)
        solution = torch.linalg.solve(normal, matrix[..., index, :][..., list(targets)] / scale) / scale
        return solution.movedim(-1, 0).movedim(-1, 1)

    def products(self, *, per_channel: bool) -> Tensor:
        """The inner products, [steps + 1, steps + 1], or those of each channel, [channels, steps + 1, steps + 1].

        Raises:
            ValueError: if those of each channel are not kept.
        """
        if not per_channel:
            return self.matrix
        if self.by_channel is None:
            raise ValueError(
                "this Gram matrix holds sums over all channels; coefficients of each channel need GramMatrix(..., "
                "channels=...) or lesa.calibrate(..., per_channel=True)"
            )
        return self.by_channel

    def error(self, plan: StepPlan, *, ridge: float = RIDGE) -> Tensor:
        """Mean squared error [steps] of the best prediction of each predicted step; zero at full steps."""
        self.check(plan)
        rest = torch.zeros(len(plan.predicted_steps), self.num_steps + 1, dtype=torch.float64)
        for row, step in enumerate(plan.predicted_steps):
            used = [f for f in plan.full_steps if f < step] + [self.num_steps]
            rest[row, used] = self.solve(used, step, ridge=ridge)
        return self._errors(plan, rest)

    def table_error(self, table: CoefficientTable) -> Tensor:
        """Mean squared error [steps] of what a table predicts of the calibration features; zero at full steps.

        Raises:
            ValueError: for a table of another number of steps or channels, or an empty matrix.
        """
        plan = table.plan
        self.check(plan)
        if table.channels is not None and len(self.products(per_channel=True)) != table.channels:
            raise ValueError(f"the table has {table.channels} channels, this matrix {self.channels}")
        rest = torch.zeros(len(table.bias), self.num_steps + 1, *table.bias.shape[1:], dtype=torch.float64)
        rest[:, list(plan.full_steps)], rest[:, -1] = table.coefficients, table.bias
        return self._errors(plan, rest)

    def _errors(self, plan: StepPlan, rest: Tensor) -> Tensor:
        """Mean squared error [steps] of predictions [predicted, steps + 1] or [predicted, steps + 1, channels]."""
        steps = list(plan.predicted_steps)
        rest[range(len(steps)), steps] = -1  # and less the truth
        per_channel = rest.ndim == 3
        columns = rest.permute(*reversed(range(rest.ndim))).contiguous()  # [..., steps + 1, predicted]
        squares = (self.products(per_channel=per_channel) @ columns * columns).sum(-2).clamp(min=0)
        result = torch.zeros(self.num_steps, dtype=torch.float64)
        result[steps] = (squares.sum(0) if per_channel else squares) / self.count
        return result

    def check(self, plan: StepPlan) -> None:
        """Raises a ValueError if a plan has another number of steps or nothing has been counted."""
        if plan.num_steps != self.num_steps:
            raise ValueError(f"the plan has {plan.num_steps} steps, this matrix {self.num_steps}")
        self._check_counted()

    def _check_counted(self) -> None:
        if self.count == 0:
            raise ValueError("this Gram matrix is empty: no batch has been completed")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            OSError: that names the file, if it cannot be written.
        """
        write_tensors(Path(path), self.tensors(), kind=KIND)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: ``gram``, and ``channels``, of which half is enough since each is symmetric."""
        result = {"gram": self.matrix.contiguous()}
        if self.by_channel is not None:
            result["channels"] = self.by_channel[(..., *torch.tril_indices(*self.matrix.shape))]
        return result

    @classmethod
    def load(cls, path: str | Path) -> "GramMatrix":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is damaged or something else; it names the file.
        """
        file = read_tensors(Path(path), kind=KIND)
        try:
            return cls.of(file.tensors)
        except ValueError as error:
            raise ValueError(damaged(file.path, KIND, error)) from error

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "GramMatrix":
        """The matrix whose :meth:`tensors` these are.

        Raises:
            ValueError: if they are those of no Gram matrix.
        """
        matrix, channels = check_tensor(tensors, "gram", (None, None)), tensors.get("channels")
        if matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
            raise ValueError(f"gram is {list(matrix.shape)}, not [steps + 1, steps + 1]")
        scale = float(matrix.diagonal().max())
        if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * abs(scale)):
            raise ValueError("gram is not symmetric")
        # inner products make no negative square, but for what adding them up rounds
        if float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()) < -1e-6 * scale or matrix[-1, -1] < 0:
            raise ValueError("gram holds no inner products: a sum of squares would be negative")
        result = cls(len(matrix) - 1)
        result.matrix = matrix
        if channels is not None:
            lower = torch.tril_indices(*matrix.shape)
            check_tensor(tensors, "channels", (None, lower.shape[1]))
            if not len(channels):
                raise ValueError("channels is empty")
            result.by_channel = matrix.new_empty(len(channels), *matrix.shape)
            for i, j in (lower, lower.flip(0)):
                result.by_channel[:, i, j] = channels
        return result


def _products(features: Tensor) -> Tensor:
    """Inner products over tokens of features [steps, tokens, channels] and the constant 1, by channel, float64."""
    steps, tokens, channels = features.shape
    total = features.new_zeros(channels, steps + 1, steps + 1, dtype=torch.float64)
    span = max(1, CHUNK // (steps * CHANNELS))
    wide = features.new_ones(min(CHANNELS, channels), steps + 1, min(span, tokens), dtype=torch.float64)
    for first in range(0, channels, CHANNELS):
        strip, into = features[..., first : first + CHANNELS], total[first : first + CHANNELS]
        for part in strip.split(span, dim=1):
            chunk = wide[: len(into), :, : part.shape[1]]
            chunk[:, :-1] = part.permute(2, 0, 1)  # the last row stays 1
            into.baddbmm_(chunk, chunk.mT)
    return total
