"""Inner products of the features of all steps: all that a linear forecaster ever needs to know of a model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.plan import StepPlan
from lesa.table import CoefficientTable
from lesa_kernels import gram_row

RIDGE = 1e-6  # relative to the mean diagonal


class GramMatrix:
    """``G[i, j] = sum <feature_i, feature_j>`` over tokens, channels and samples, in float64 [steps + 1, steps + 1].

    The last row and column belong to the constant feature 1, so that a bias can be fitted. One matrix serves every
    plan: the best prediction of step s from the full steps A is ``G_AA^-1 G_As`` with squared error
    ``G_ss - G_sA G_AA^-1 G_As``.

    Args:
        num_steps: steps of the schedule.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.matrix = torch.zeros(num_steps + 1, num_steps + 1, dtype=torch.float64)
        self._forget()

    def _forget(self) -> None:
        self._pending = torch.zeros_like(self.matrix)
        self._features: Tensor | None = None  # of the batch so far, [steps, elements]
        self._next_step = 0

    def update(self, step: int, feature: Tensor) -> None:
        """Add a feature of the current batch of samples; step 0 begins a new batch, the last step counts it.

        A batch that is broken off leaves the matrix as it was.

        Raises:
            ValueError: if steps do not come in order, shapes change within a batch, or the feature is not finite.
        """
        if step == 0:
            self._forget()
        if step != self._next_step:
            raise ValueError(f"step {step} does not follow step {self._next_step - 1}; step 0 begins a new batch")
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
            self.matrix += self._pending
            self._forget()

    @property
    def count(self) -> int:
        """Elements counted: samples x tokens x channels."""
        return int(self.matrix[-1, -1])

    def merge(self, other: "GramMatrix") -> None:
        """Add what another machine measured.

        Raises:
            ValueError: for another number of steps.
        """
        if other.num_steps != self.num_steps:
            raise ValueError(f"cannot merge matrices of {other.num_steps} and {self.num_steps} steps")
        self.matrix += other.matrix

    def solve(self, used: Sequence[int], target: int, *, ridge: float = RIDGE) -> Tensor:
        """Coefficients [used] of the best combination of steps ``used`` (``num_steps`` is the constant) for ``target``.

        Raises:
            ValueError: if nothing has been counted.
        """
        if self.count == 0:
            raise ValueError("this Gram matrix is empty: no batch has been completed")
        index = torch.tensor(list(used))
        system = self.matrix[index][:, index]
        # The constant is scaled like the others, or its ridge would be one of another size.
        scale = system.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        normal = system / scale / scale.unsqueeze(1) + ridge * torch.eye(len(index), dtype=torch.float64)
        return torch.linalg.solve(normal, self.matrix[index, target] / scale) / scale

    def error(self, plan: StepPlan, *, ridge: float = RIDGE) -> Tensor:
        """Mean squared error [steps] of the best prediction of each predicted step; zero at full steps."""
        self._check(plan)
        result = torch.zeros(self.num_steps, dtype=torch.float64)
        for step in plan.predicted_steps:
            used = [f for f in plan.full_steps if f < step] + [self.num_steps]
            result[step] = self._error(step, torch.tensor(used), self.solve(used, step, ridge=ridge))
        return result

    def table_error(self, table: CoefficientTable) -> Tensor:
        """Mean squared error [steps] of what a table predicts of the calibration features; zero at full steps.

        Raises:
            ValueError: for a table of another number of steps, or an empty matrix.
        """
        plan = table.plan
        self._check(plan)
        used = torch.tensor([*plan.full_steps, self.num_steps])
        result = torch.zeros(self.num_steps, dtype=torch.float64)
        for row, bias, step in zip(table.coefficients, table.bias, plan.predicted_steps, strict=True):
            result[step] = self._error(step, used, torch.cat([row, bias[None]]))
        return result

    def _error(self, step: int, used: Tensor, coefficients: Tensor) -> Tensor:
        system, target = self.matrix[used][:, used], self.matrix[used, step]
        total = self.matrix[step, step] - 2 * coefficients @ target + coefficients @ system @ coefficients
        return total.clamp(min=0) / self.count

    def _check(self, plan: StepPlan) -> None:
        if plan.num_steps != self.num_steps:
            raise ValueError(f"the plan has {plan.num_steps} steps, this matrix {self.num_steps}")
        if self.count == 0:
            raise ValueError("this Gram matrix is empty: no batch has been completed")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({"gram": self.matrix.contiguous()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> "GramMatrix":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged or something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                matrix = file.get_tensor("gram")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete Gram matrix file: {error}") from error
        result = cls(len(matrix) - 1)
        result.matrix = matrix
        return result
