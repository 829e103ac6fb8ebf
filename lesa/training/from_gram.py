"""``fit_gram``: train LESA on the statistics of a calibration, without features.

The closed loop is linear in the full features. So unrolling it gives a table, and the error of a table in the sample is
a quadratic form (:mod:`lesa.statistics.output_errors`) with an exact gradient through the whole loop. First the gate of
each predicted step is a free number; then the KANs are fitted to these numbers and optimised together with the stage
weights. With the KANs from the start an iteration would take ten times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lesa.arguments import whole
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import OutputErrorGram, path_weights
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times
from lesa.training.seeding import seeded

PATH = 1.0
REGRESSION_STEPS, REGRESSION_ROUNDS = 400, 10


def fit_gram(
    errors: OutputErrorGram | GramMatrix,
    plan: StepPlan,
    times: Tensor | Sequence[float],
    config: LesaConfig | None = None,
    *,
    rounds: tuple[int, int] = (30, 3),
    seed: int = 0,
    progress: bool = True,
) -> LesaPredictor:
    """The paper's predictor with the smallest error in the sample that its form allows.

    Args:
        errors: of one stream of a calibration; of a plain Gram matrix, errors count on the features themselves.
        plan: the full steps that sampling will run.
        times: the schedule, [steps] or [steps + 1].
        config: the shape of the predictor, with linear window weights; None: the paper's.
        rounds: of L-BFGS, 20 steps each, with free gates and with KANs.
        seed: of the initial weights.
        progress: show a progress bar.

    Returns:
        The predictor, with its plan and schedule. Biases are zero, since the norm after them removes them.

    Raises:
        ValueError: if plan, times, config and errors have different numbers of steps, or the config is not linear.
    """
    errors = OutputErrorGram.from_gram(errors) if isinstance(errors, GramMatrix) else errors
    if not isinstance(errors, OutputErrorGram):
        raise ValueError(
            f"errors must be an OutputErrorGram or a GramMatrix, not a {type(errors).__name__}; of a calibration they "
            "are calibration.errors((component, branch))"
        )
    if len(rounds) != 2:
        raise ValueError(f"rounds must be two numbers, with free gates and with KANs, not {rounds!r:.80}")
    for number in rounds:
        whole("each of rounds", number, least=0)
    errors.check(plan)
    times = as_times(times, plan.num_steps)
    config = config or LesaConfig(plan.num_steps)
    if config.latent != "linear":
        raise ValueError("only a predictor with latent='linear' has a table that inner products can judge")
    with seeded(whole("seed", seed)):
        predictor = LesaPredictor(config).double()
    loss = PathLoss(errors, plan, times, config)
    weights = [nn.Parameter(_start(window)) for window in config.windows]
    gates = nn.Parameter(torch.zeros(len(plan.predicted_steps), dtype=torch.float64))
    with tqdm(total=sum(rounds) + REGRESSION_ROUNDS, desc="fitting", disable=not progress, delay=2) as bar:
        _minimise(lambda: loss(weights, gates), [*weights, gates], rounds[0], bar)
        loss.balance(weights, gates)
        _regress(predictor, plan, times, gates.detach(), bar)
        layers: Any = predictor.latent
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight)
                layer.bias.zero_()
        shared: list[Tensor] = [layer.weight for layer in layers]
        kans = [p for p in predictor.timestep.parameters() if p.requires_grad]
        steps = list(plan.predicted_steps)
        _minimise(lambda: loss(shared, predictor.gates(times)[steps]), [*shared, *kans], rounds[1], bar)
    predictor.schedule, predictor.plan = times, plan
    return predictor.float().eval().requires_grad_(False)


class PathLoss:
    """The error in the sample of LESA with given window weights and gates, relative to the error of reuse."""

    def __init__(self, errors: OutputErrorGram, plan: StepPlan, times: Tensor, config: LesaConfig) -> None:
        self._plan = plan
        self._stages = [config.stage(float(time)) for time in times[:-1]]
        self._windows = config.windows
        pairs = [
            (row, slot, step, full)
            for row, step in enumerate(plan.predicted_steps)
            for slot, full in enumerate(plan.full_steps)
            if full < step
        ]
        self._row, self._slot, target, used = torch.tensor(pairs).T
        self._lengths = errors.length(target, used)
        self._system = errors.products(target, used) * path_weights(plan, times, PATH)[target[:, None], target]
        reuse = torch.zeros(len(config.windows), max(config.windows), dtype=torch.float64)
        none = torch.zeros(len(plan.predicted_steps), dtype=torch.float64)
        self._unit = 1.0
        self._unit = self([w[None, -k:] for w, k in zip(reuse, config.windows, strict=True)], none).item()

    def __call__(self, weights: Sequence[Tensor], gates: Tensor) -> Tensor:
        """weights [1, K] of each stage, gates [predicted] -> a number."""
        table = self._unroll(weights, gates)[self._row, self._slot]
        length = torch.zeros(len(gates), dtype=torch.float64).index_add(0, self._row, table * self._lengths)
        table = table / length[self._row]
        return table @ self._system @ table / self._unit

    @torch.no_grad()
    def balance(self, weights: Sequence[Tensor], gates: Tensor) -> None:
        """Scale gates to mean size 1 in each stage, near which KANs start, and the weights by the inverse."""
        stages = torch.tensor([self._stages[step] for step in self._plan.predicted_steps])
        for stage, weight in enumerate(weights):
            scale = gates[stages == stage].abs().mean()
            if scale > 0:
                gates[stages == stage] /= scale
                weight *= scale

    def _unroll(self, weights: Sequence[Tensor], gates: Tensor) -> Tensor:
        """The closed loop on unit vectors, [predicted, full]."""
        units = iter(torch.eye(len(self._plan.full_steps), dtype=torch.float64))
        gate = iter(gates)
        rows: list[Tensor] = []
        for step, stage in enumerate(self._stages):
            if self._plan.is_full(step):
                rows.append(next(units))
                continue
            window = torch.stack(rows[-self._windows[stage] :])
            rows.append(rows[-1] + next(gate) * (weights[stage][0, -len(window) :] @ window))
        return torch.stack([rows[step] for step in self._plan.predicted_steps])


def _start(window: int) -> Tensor:
    """The latest difference of the window, which a gate of 1 continues."""
    weight = torch.zeros(1, window, dtype=torch.float64)
    weight[0, -2:] = torch.tensor([-1.0, 1.0])[-window:]
    return weight


def _minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor], iterations: int, bar: tqdm) -> None:
    """L-BFGS in float64, since the quadratic form is badly conditioned."""
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=20, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(iterations):
        value = optimizer.step(closure)
        bar.update()
        bar.set_postfix(error=f"{value.item() ** 0.5:.5f}", refresh=False)


def _regress(predictor: LesaPredictor, plan: StepPlan, times: Tensor, gates: Tensor, bar: tqdm) -> None:
    """Fit the KANs to these gates: first with Adam, which finds a good start for L-BFGS."""
    steps = list(plan.predicted_steps)
    parameters = [p for p in predictor.timestep.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return (predictor.gates(times)[steps] - gates).square().mean()

    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(REGRESSION_STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    _minimise(loss, parameters, REGRESSION_ROUNDS, bar)
