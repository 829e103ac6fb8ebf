"""LESA: a stage-aware learned predictor with KAN gates.

Source: Cai et al., "LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration",
https://arxiv.org/abs/2602.20497. At a predicted step of time t, in stage e with window h (oldest first):

    z      = sum_k w_e[k] h[k] + b_e
    alpha  = KAN_e(t - t_0, ..., t - t_S)
    h_hat  = h[last] + alpha z

With ``latent="kan"``, which is not in the paper, z has a KAN of the features as well.
"""

import copy
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from lesa.predictor.config import LesaConfig
from lesa.predictor.description import Description
from lesa.predictor.pretrained import Pretrained
from lesa.predictor.window import FeatureWindow
from lesa.tables.forecaster import Forecaster
from lesa.tables.memory import Memory
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll
from lesa.tables.times import as_times, difference, same_times
from lesa_kernels import KAN, combine, kan_predict


class WindowKAN(nn.Linear):
    """Window weights and bias of one stage, with weights [K] of SiLU and [K, bases] of splines on the same window."""

    def __init__(self, window: int, bases: int) -> None:
        super().__init__(window, 1)
        # from zero: training starts at the paper's predictor
        self.base_weight = nn.Parameter(torch.zeros(window))
        self.spline_weight = nn.Parameter(torch.zeros(window, bases))


class LesaPredictor(nn.Module, Forecaster, Pretrained):
    """Window weights, a bias and a KAN gate for each stage; one predictor for each branch of guidance.

    The keys of ``state_dict`` are the released ones: ``latent.{e}.weight``, ``latent.{e}.bias``,
    ``timestep.{e}.layers.{l}.base_weight`` and so on.

    Attributes:
        config: its :class:`LesaConfig`.
        plan: the plan it was fitted for, or None. It serves any plan of as many steps; this is the one that
            :func:`lesa.enable` uses if none is given.
        schedule: the times [steps + 1] it was fitted on, or None. The gates are learned functions of these times, so
            a table for others is refused; set it to None to try all the same.
        losses: the loss curve of :func:`lesa.fit`, a list of numbers for each stage of training.
        scale: [channels], scales features into the grid of a ``latent="kan"`` predictor; set by :func:`lesa.fit`.
    """

    plan: StepPlan | None = None

    def __init__(self, config: LesaConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule: Tensor | None = None
        self.losses: dict[str, list[float]] = {}
        bases = config.grid_size + config.spline_order
        kan = config.latent == "kan"
        self.latent = nn.ModuleList(WindowKAN(w, bases) if kan else nn.Linear(w, 1) for w in config.windows)
        self.scale: Tensor | None
        self.register_buffer("scale", torch.ones(1) if kan else None)
        self.timestep = nn.ModuleList(
            KAN(
                config.gate_widths,
                grid_size=config.grid_size,
                spline_order=config.spline_order,
                grid_range=config.grid_range,
            )
            for _ in config.windows
        )

    def layer(self, stage: int) -> nn.Linear:
        """Window weights [1, K] and bias [1] of a stage."""
        layer = self.latent[stage]
        assert isinstance(layer, nn.Linear)
        return layer

    def gates(self, times: Tensor | Sequence[float], steps: Sequence[int] | None = None) -> Tensor:
        """alpha [steps]: the gate of every step of a schedule, or of the steps asked for; one batch for each stage.

        Raises:
            ValueError: for another number of times than the predictor was made for.
        """
        known = as_times(times, self.config.num_steps)
        parameter = self.layer(0).weight
        asked = known[:-1] if steps is None else known[list(steps)]
        offsets = (asked[:, None] - known).to(parameter.device, parameter.dtype)
        stages = torch.tensor([self.config.stage(t) for t in asked.tolist()], device=parameter.device)
        result = parameter.new_zeros(len(asked))
        for stage in stages.unique().tolist():
            (members,) = torch.nonzero(stages == stage, as_tuple=True)
            result = result.index_put((members,), self.timestep[stage](offsets[members]).squeeze(-1))
        return result

    def forward(self, history: Tensor | Sequence[Tensor], times: Tensor | Sequence[float], t: float | Tensor) -> Tensor:
        """One closed-loop step of the paper, differentiable.

        Args:
            history: the latest features, full or predicted, oldest first: [k, *feature] or k tensors. If there are more
                than the stage's window, the latest are used; if fewer, the latest weights of the window.
            times: the schedule, [steps] or [steps + 1].
            t: the time of the predicted step.

        Returns:
            [*feature], in the dtype of the features.
        """
        t = float(t)
        stage = self.config.stage(t)
        parameter = self.layer(stage).weight
        offsets = (t - as_times(times, self.config.num_steps)).to(parameter.device, parameter.dtype)
        return self.advance(history, stage, self.timestep[stage](offsets))

    def advance(self, history: Tensor | Sequence[Tensor], stage: int, alpha: Tensor) -> Tensor:
        """``h[last] + alpha z`` over the latest features of ``history`` [k, *feature], in the given stage."""
        layer = self.layer(stage)
        latest = history[-layer.in_features :]
        if len(latest) == 0:
            raise ValueError("nothing can be predicted from an empty history; the first step must be full")
        window = latest if isinstance(latest, Tensor) else torch.stack(list(latest))
        weight = layer.weight[0, -len(window) :]
        if isinstance(layer, WindowKAN):
            return kan_predict(
                window,
                alpha.reshape(1, 1),
                weight[None],
                layer.base_weight[None, -len(window) :],
                layer.spline_weight[None, -len(window) :],
                layer.bias,
                scale=None if self.scale is None else self.scale.expand(window.shape[-1]),
                order=self.config.spline_order,
                grid_range=self.config.grid_range,
            )[0]
        # h[last] + alpha w.h is one sum with 1 added to the last coefficient, so the features are read once
        coefficients = alpha.reshape(1, 1) * weight + torch.eye(len(window), device=weight.device)[-1]
        bias = (alpha * layer.bias).reshape(1)
        wide = torch.promote_types(window.dtype, torch.float32)
        return combine(window, coefficients.to(wide), bias.to(wide))[0]

    def table(self, plan: StepPlan, times: Tensor | Sequence[float]) -> CoefficientTable:
        """The closed loop of a whole generation as one table over its full features, in float64.

        A predictor that was fitted on a stream which takes part in some steps only serves these steps of the schedule.

        Raises:
            ValueError: if the plan has another number of steps, or the schedule is not the one it was fitted on.
        """
        if self.config.latent == "kan":
            raise ValueError(
                "a KAN on the features is not linear in them and has no table; sample with it by lesa.enable"
            )
        first = self._first_of(plan, times)
        if first is not None:
            return self._table_of_part(plan, times, first)
        known = self.check_schedule(plan, times)
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        with torch.no_grad():
            alphas = exact.gates(known)

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            layer = exact.layer(self.config.stage(float(known[step])))
            window = torch.stack(rows[-layer.in_features :])
            z = layer.weight[0, -len(window) :] @ window
            z[-1] += layer.bias[0]  # the last entry of a row is the coefficient of the constant 1
            return rows[-1] + alphas[step] * z

        with torch.no_grad():
            return unroll(plan, known, rule)

    def _first_of(self, plan: StepPlan, times: Tensor | Sequence[float]) -> int | None:
        """The step of a longer schedule at which its own times begin; None if they are not a part of it."""
        steps = self.config.num_steps
        if self.schedule is None or plan.num_steps <= steps:
            return None
        given = as_times(times, plan.num_steps)
        first = [i for i in range(plan.num_steps - steps + 1) if same_times(given[i : i + steps + 1], self.schedule)]
        return first[0] if first and first[0] <= plan.start < first[0] + steps else None

    def _table_of_part(self, plan: StepPlan, times: Tensor | Sequence[float], first: int) -> CoefficientTable:
        """The table of its own steps, from ``first`` on; the steps after them do not run and reuse the last feature."""
        assert self.schedule is not None
        own = self.table(plan.within(first, len(self.schedule) - 1), self.schedule)
        coefficients = torch.zeros(len(plan.predicted_steps), len(plan.full_steps), dtype=torch.float64)
        bias = coefficients.new_zeros(len(coefficients))
        rows, columns = own.coefficients.shape
        coefficients[:rows, :columns], bias[:rows] = own.coefficients, own.bias
        for row, step in zip(coefficients[rows:], plan.predicted_steps[rows:], strict=True):
            row[sum(full < step for full in plan.full_steps) - 1] = 1
        return CoefficientTable(plan, times, coefficients, bias)

    def check_schedule(self, plan: StepPlan, times: Tensor | Sequence[float]) -> Tensor:
        """The times as float64 [steps + 1].

        Raises:
            ValueError: if the plan has another number of steps, or the schedule is not the one it was fitted on.
        """
        steps = self.config.num_steps
        if plan.num_steps != steps:
            raise ValueError(
                f"this predictor was made for {steps} steps, the plan has {plan.num_steps}; sample {steps} steps with "
                f"a plan for as many, or fit a predictor for {plan.num_steps} steps"
            )
        known = as_times(times, steps)
        if self.schedule is not None and not same_times(known, self.schedule):
            raise ValueError(
                f"this predictor was fitted on another schedule of {steps} steps (another time shift, resolution or "
                f"solver), where its gates mean nothing: {difference(self.schedule, known)}. Sample as it was fitted, "
                "fit one on this schedule, or set predictor.schedule = None to try all the same"
            )
        return known

    def check_plan(self, plan: StepPlan) -> None:
        """Refuse a plan of another number of steps, unless the predictor was fitted on a part of this one."""
        steps, own = self.config.num_steps, self.plan
        if steps == plan.num_steps or (own is not None and steps < own.num_steps == plan.num_steps):
            return
        raise ValueError(
            f"the forecaster was made for {steps} steps, the plan has {plan.num_steps}; give a plan for {steps} "
            f"steps and sample with num_inference_steps={steps}, or fit one for {plan.num_steps} steps"
        )

    @property
    def state(self) -> Hashable:
        """Changes when a weight is replaced or written to."""
        return tuple((id(p), p._version) for p in self.parameters() if not p.is_inference())

    def make_memory(self, plan: StepPlan, times: Tensor, previous: Memory | None) -> Memory | None:
        """A window of features for ``latent="kan"``, which has no table; else None."""
        if self.config.latent != "kan":
            return None
        assert previous is None or isinstance(previous, FeatureWindow)
        known = self.check_schedule(plan, times).tolist()
        predictor = copy.deepcopy(self)  # moves to the device of the features; the user's stays where it is
        with torch.no_grad():
            gates = predictor.gates(known)

        def advance(window: Tensor, step: int) -> Tensor:
            nonlocal gates
            gates = gates.to(window.device)
            return predictor.to(window.device).advance(window, self.config.stage(known[step]), gates[step])

        return FeatureWindow(advance, max(self.config.windows), plan, previous)

    def describe(self) -> Description:
        """All of it but the weights."""
        schedule = None if self.schedule is None else self.schedule.tolist()
        return Description(self.config, self.plan, schedule, self.losses)

    @classmethod
    def restore(cls, description: Description, weights: dict[str, Tensor]) -> "LesaPredictor":
        """The predictor with this description and these weights."""
        with torch.device("meta"):  # no weights are made only to be replaced: splines take a while to fit
            predictor = cls(description.config)
        if "scale" in weights:
            predictor.scale = weights["scale"]  # its length, the number of channels, is not in the config
        predictor.load_state_dict(weights, assign=True)
        predictor.plan, predictor.losses = description.plan, description.losses
        if description.schedule is not None:
            predictor.schedule = torch.tensor(description.schedule, dtype=torch.float64)
        return predictor
