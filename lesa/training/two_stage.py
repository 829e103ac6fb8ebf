"""``fit``: the two training stages of LESA on the features of whole generations.

Source: Cai et al., https://arxiv.org/abs/2602.20497. The loss is L1 to the true feature; the base model is not needed.

    guided       the window holds true features
    closed loop  between full steps it holds the predictor's own, detached predictions, as in sampling
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.arguments import real, whole
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.runtime.driver import LesaWarning
from lesa.tables.forecaster import Stream
from lesa.tables.plan import StepPlan
from lesa.training.checkpoint import TrainingState
from lesa.training.interval import interval_error, intervals
from lesa.training.seeding import seeded
from lesa.training.trajectories import Trajectories

STAGES = ("guided", "closed loop")


class Processes(Protocol):
    """The part of ``accelerate.Accelerator`` that is used: the number of this process, and sums over all."""

    process_index: int
    num_processes: int
    device: torch.device

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The sum of a tensor over all processes, for ``"sum"``."""
        ...


def fit(
    trajectories: Trajectories,
    plan: StepPlan,
    config: LesaConfig | None = None,
    *,
    stream: Stream | None = None,
    epochs: tuple[int, int] = (3, 3),
    batch: int = 4,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    accelerator: Processes | None = None,
    progress: bool = True,
) -> LesaPredictor:
    """Train a predictor for a plan on the features of one stream.

    Features may be of any dtype; parameters, loss and optimizer are float32. An update sees all predicted steps of one
    interval, in one pass over the features.

    Args:
        trajectories: true features of whole generations, recorded by :func:`lesa.collect`.
        plan: the full steps that sampling will run, of the whole schedule also where the stream takes part in some of
            its steps only.
        config: the shape of the predictor; None: the paper's for this number of steps.
        stream: (component, branch), where several were recorded.
        epochs: passes over the samples in the guided and in the closed-loop stage.
        batch: samples an update sees, over all processes.
        learning_rate: of AdamW, falling to zero along a cosine over all updates. The released recipe (1e-4, halved
            every 500 updates) leaves small models where they started.
        weight_decay: of AdamW.
        seed: of the initial weights and the order of samples; the same seed gives the same predictor.
        checkpoint: a file with the state of the training. If it exists, the training continues from it.
        device: where to train; None: on the accelerator's, else on the GPU if there is one.
        accelerator: an ``accelerate.Accelerator`` whose processes share every batch: each reads its part of the
            samples, and gradients are summed over all. The result is that of one process.
        progress: show a progress bar.

    Returns:
        The predictor, with ``schedule`` the times it was trained on and ``losses`` the curve of
        each stage: one mean absolute error for each batch.

    Raises:
        ValueError: if plan, config and trajectories have different numbers of steps, a feature holds NaN, the plan
            leaves nothing to predict, or the checkpoint belongs to another training.
    """
    _check_numbers(epochs, batch, learning_rate, weight_decay, seed)
    _check_kinds(trajectories, plan)
    stream = trajectories.stream(stream)
    source, own_plan = _on_own_steps(trajectories, plan, stream)
    config = config or LesaConfig(source.num_steps)
    _check_steps(source, own_plan, config)
    if config.latent == "kan" and own_plan != plan:
        raise ValueError("a predictor of a part of the schedule needs a table, which latent='kan' does not have")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    if device is None:
        device = accelerator.device if accelerator is not None else "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(seed):
        predictor = LesaPredictor(config).train()
    if config.latent == "kan":
        predictor.scale = _scale(next(iter(source.batches(batch, stream=stream))), own_plan)
    predictor.to(device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate, weight_decay=weight_decay)
    state = TrainingState(predictor, optimizer, losses={stage: [] for stage in STAGES})
    arguments = {
        "config": dataclasses.asdict(config),
        "full_steps": own_plan.full_steps,
        "samples": source.samples,
        "stream": list(stream),
        "times": source.times.tolist(),
        "features": "" if checkpoint is None else source.digest(stream),
        "settings": [epochs, batch, learning_rate, weight_decay, seed],
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        state.restore(path, arguments)

    batches_per_epoch = source.num_batches(batch)
    total = sum(epochs) * batches_per_epoch
    with tqdm(total=total, initial=state.batches, desc="fitting", disable=not progress or rank > 0, delay=2) as bar:
        for epoch in range(state.batches // batches_per_epoch, sum(epochs)):
            stage = STAGES[epoch >= epochs[0]]
            done = state.batches - epoch * batches_per_epoch
            for features in source.batches(batch, stream=stream, seed=seed + epoch, skip=done, part=(rank, world)):
                if not bool(features.isfinite().all()):
                    raise ValueError("a recorded feature holds NaN or infinity; collect these trajectories again")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * state.batches / total))
                features = features.to(device, non_blocking=True)
                loss = train_on(state, features, source.times, own_plan, accelerator, closed=stage == STAGES[1])
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the training diverged at batch {state.batches + 1} of {total}: its loss is {loss}; give a "
                        f"smaller learning_rate than {learning_rate:g}"
                    )
                state.losses[stage].append(loss)
                state.batches += 1
                bar.update()
                bar.set_postfix(stage=stage, loss=f"{loss:.4f}", refresh=False)
                if path is not None and rank == 0:
                    _save(state, path, arguments, last=state.batches == total)
    if not all(bool(p.isfinite().all()) for p in predictor.parameters()):
        raise ValueError(f"the training diverged; give a smaller learning_rate than {learning_rate:g}")
    predictor.schedule, predictor.plan = source.times, plan
    predictor.losses = state.losses
    return predictor.cpu().eval().requires_grad_(False)


def _save(state: TrainingState, path: Path, arguments: dict[str, Any], *, last: bool) -> None:
    """Write a checkpoint. A finished training does not fail if the last one cannot be written."""
    try:
        state.save(path, arguments, only_if_due=not last)
    except OSError as error:
        if not last:
            raise
        warnings.warn(f"the training is done, and its checkpoint is not: {error}", LesaWarning, stacklevel=3)


def _check_numbers(epochs: Any, batch: Any, learning_rate: Any, weight_decay: Any, seed: Any) -> None:
    if not isinstance(epochs, Sequence) or len(epochs) != 2:
        raise ValueError(f"epochs must be two numbers, guided and closed-loop, not {epochs!r:.80}")
    for number in epochs:
        whole("each of epochs", number, least=0)
    if not any(epochs):
        raise ValueError("epochs must be at least 1 in one of the two stages")
    whole("batch", batch, least=1)
    real("learning_rate", learning_rate, least=0)
    real("weight_decay", weight_decay, least=0)
    whole("seed", seed)


def _check_kinds(trajectories: Any, plan: Any) -> None:
    if not isinstance(trajectories, Trajectories):
        raise ValueError(
            f"trajectories must be what lesa.collect returned, or lesa.Trajectories.load(folder) of its folder, not a "
            f"{type(trajectories).__name__}; inner products are fitted by lesa.fit_gram"
        )
    if not isinstance(plan, StepPlan):
        raise ValueError(
            f"plan must be a StepPlan, such as StepPlan.paper(50, interval=7), not a {type(plan).__name__}"
        )


def _on_own_steps(source: Trajectories, plan: StepPlan, stream: Stream) -> tuple[Trajectories, StepPlan]:
    """The trajectories and the plan of the steps that the stream takes part in."""
    first, own = source.firsts[stream], source.of(stream)
    if (first, own.num_steps) == (0, source.num_steps):
        return source, plan
    if plan.num_steps != source.num_steps:
        raise ValueError(
            f"plan has {plan.num_steps} steps and the schedule {source.num_steps}, of which {'.'.join(stream)} "
            f"takes part in {first} to {first + own.num_steps - 1}; give the plan of the whole schedule"
        )
    return own, plan.within(first, own.num_steps)


def _check_steps(source: Trajectories, plan: StepPlan, config: LesaConfig) -> None:
    steps = {"plan": plan.num_steps, "trajectories": source.num_steps, "config": config.num_steps}
    if len(set(steps.values())) > 1:
        raise ValueError(f"plan, config and trajectories must have the same number of steps, not {steps}")
    if not plan.predicted_steps:
        raise ValueError("every step of this plan is full; there is nothing to learn")


def train_on(
    state: TrainingState,
    features: Tensor,
    times: Tensor,
    plan: StepPlan,
    accelerator: Processes | None,
    *,
    closed: bool,
) -> float:
    """One update for each interval, on this process's features [samples, steps, *feature]; returns the mean error."""
    true = features.transpose(0, 1).contiguous()
    window = true.clone() if closed else true
    errors = []
    for interval in intervals(plan):
        error = interval_error(state.predictor, times, interval, true, window, closed=closed)
        state.optimizer.zero_grad()
        error.backward()
        count = torch.tensor(float(true[interval[0]].numel() * len(interval)), dtype=torch.float64)
        errors.append(_mean_over_all(state.predictor, error.detach(), count, accelerator))
        torch.nn.utils.clip_grad_norm_(state.predictor.parameters(), 1.0)
        state.optimizer.step()
    total, count = torch.stack(errors).sum(0).tolist()
    return float(total / count)


def _mean_over_all(predictor: LesaPredictor, error: Tensor, count: Tensor, accelerator: Processes | None) -> Tensor:
    """All-reduce: from the gradient of a sum over this process's elements to the gradient of the global mean.

    Returns [sum, count] over all. All gradients travel in one message, since each is small and latencies add up.
    """
    gradients = [p.grad for p in predictor.parameters() if p.grad is not None]
    message = torch.cat(
        [g.flatten().double() for g in gradients] + [torch.stack([error.double(), count.to(error.device)])]
    )
    if accelerator is not None:
        message = accelerator.reduce(message, reduction="sum")
    parts = (message[:-2] / message[-1]).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return message[-2:]


def _scale(features: Tensor, plan: StepPlan) -> Tensor:
    """1 / standard deviation of each channel, so that 99.7 % of normal features lie within the grid, -3 to 3."""
    return 1 / features[:, list(plan.full_steps)].float().flatten(0, -2).std(0).clamp(min=1e-6)
