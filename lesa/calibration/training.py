"""``fit``: the two training stages of LESA on the features of whole generations.

Source: Cai et al., https://arxiv.org/abs/2602.20497. The base model is not needed; the loss is L1 to the true feature.

    guided       the window holds true features
    closed loop  between full steps it holds the predictor's own, detached predictions, as in sampling
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.arguments import real, whole
from lesa.calibration.checkpoint import Progress
from lesa.calibration.interval import interval_error, intervals
from lesa.calibration.seeding import seeded
from lesa.calibration.trajectories import Source, Stream, Trajectories
from lesa.plan import StepPlan
from lesa.predictor import LesaConfig, LesaPredictor
from lesa.runtime.warning import LesaWarning
from lesa.schedule import same_times

Plans = StepPlan | Sequence[StepPlan]
Lesson = tuple[Source, list[StepPlan]]
STAGES = ("guided", "closed loop")


class Processes(Protocol):
    """What is needed of an ``accelerate.Accelerator``: who this process is, and sums over all of them."""

    process_index: int
    num_processes: int
    device: torch.device

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The sum of a tensor over all processes, for ``"sum"``."""
        ...


def fit(
    trajectories: Source | Sequence[tuple[Source, Plans]],
    plan: Plans | None = None,
    config: LesaConfig | None = None,
    *,
    stream: Stream | None = None,
    start: LesaPredictor | None = None,
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
    interval, in one pass over the features. Where several plans or schedules are learned at once, the loss of an update
    is the logarithm of its error, so that long intervals, which are hard, do not drown the short ones.

    Args:
        trajectories: true features of whole generations: recorded by :func:`lesa.collect`, or
            :class:`lesa.LiveTrajectories`. Several schedules at once, for a predictor with ``anchors``: pairs of
            trajectories and a plan or plans.
        plan: the full steps that sampling will run, of the whole schedule also where the stream takes part in some of
            its steps only. Of several plans each batch is trained on one, drawn at random.
        config: the shape of the predictor; None: that of ``start``, or the paper's for this number of steps.
        stream: (component, branch), where several were recorded.
        start: a predictor to go on from; None: from scratch, as in the paper. Going on from what :func:`lesa.fit_gram`
            found undoes it: an L1 loss on features knows nothing of the final norm and of errors that cancel.
        epochs: passes over the samples in the guided and in the closed-loop stage.
        batch: samples an update sees, over all processes.
        learning_rate: of AdamW, falling to zero along a cosine over all updates. The released recipe (1e-4, halved
            every 500 updates) leaves small models where they started.
        weight_decay: of AdamW.
        seed: of the initial weights and the order of samples; the same seed gives the same predictor.
        checkpoint: a file that keeps the state of the training. If it is there already, training goes on from it.
        device: where to train; None: on the accelerator's, else on the GPU if there is one.
        accelerator: an ``accelerate.Accelerator`` whose processes share every batch: each reads its part of the
            samples, and gradients are added up over all of them. The result is that of one process.
        progress: show a progress bar.

    Returns:
        The predictor, with ``schedule`` the times it was trained on (None with anchors) and ``losses`` the curve of
        each stage: one mean absolute error for each batch.

    Raises:
        ValueError: if plan, config and trajectories have different numbers of steps, a feature holds NaN, a plan leaves
            nothing to predict, there are several schedules without anchors, the checkpoint belongs to another training,
            or ``start`` has another config.
    """
    _check_numbers(epochs, batch, learning_rate, weight_decay, seed)
    whole_plans = _lessons(trajectories, plan)
    lessons = [_on_own_steps(source, plans, stream) for source, plans in whole_plans]
    if start is not None and config not in (None, start.config):
        raise ValueError("a training goes on with the config of its start; leave config= away")
    config = config or (LesaConfig(lessons[0][0].num_steps) if start is None else start.config)
    _check(lessons, config, stream)
    if config.latent == "kan" and any(
        plans != whole for (_, plans), (_, whole) in zip(lessons, whole_plans, strict=True)
    ):
        raise ValueError("latent='kan' has no table, which a stream on some steps of the schedule needs; leave it away")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    if device is None:
        device = accelerator.device if accelerator is not None else "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(seed):
        predictor = LesaPredictor(config).train()
    if start is not None:
        predictor.scale = start.scale
        predictor.load_state_dict(start.state_dict())
    elif config.latent == "kan":
        predictor.scale = _scale(next(iter(lessons[0][0].batches(batch, stream=stream))), lessons[0][1][0])
    predictor.to(device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate, weight_decay=weight_decay)
    state = Progress(predictor, optimizer, losses={stage: [] for stage in STAGES})
    arguments = {
        "config": dataclasses.asdict(config),
        "full_steps": [[p.full_steps for p in plans] for _, plans in lessons],
        "samples": [source.samples for source, _ in lessons],
        "stream": [list(source.stream(stream)) for source, _ in lessons],
        "times": [source.times.tolist() for source, _ in lessons],
        "features": [source.digest(source.stream(stream)) for source, _ in lessons] if checkpoint is not None else [],
        "settings": [epochs, batch, learning_rate, weight_decay, seed],
    }
    if start is not None:
        arguments["start"] = _digest(start)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        state.restore(path, arguments)

    several = sum(len(plans) for _, plans in lessons) > 1
    batches_per_epoch = sum(source.num_batches(batch) for source, _ in lessons)
    total = sum(epochs) * batches_per_epoch
    with tqdm(total=total, initial=state.batches, desc="fitting", disable=not progress or rank > 0, delay=2) as bar:
        for epoch in range(state.batches // batches_per_epoch, sum(epochs)):
            stage = STAGES[epoch >= epochs[0]]
            done = state.batches - epoch * batches_per_epoch
            batches = _batches(lessons, batch, stream, seed=seed + epoch, skip=done, part=(rank, world))
            for features, times, chosen in batches:
                if not bool(features.isfinite().all()):
                    raise ValueError("a recorded feature holds NaN or infinity; collect these trajectories again")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * state.batches / total))
                features = features.to(device, non_blocking=True)
                loss = _train_on(
                    state, features, times, chosen, accelerator, closed=stage == STAGES[1], relative=several
                )
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
    if config.anchors is None:
        predictor.schedule = lessons[0][0].times
    if len(lessons) == len(lessons[0][1]) == 1:
        predictor.plan = whole_plans[0][1][0]
    predictor.losses = state.losses
    return predictor.cpu().eval().requires_grad_(False)


def _save(state: Progress, path: Path, arguments: dict[str, Any], *, last: bool) -> None:
    """Write a checkpoint. The last one is of no use to a training that is done, which does not fail for want of it."""
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


def _lessons(trajectories: Source | Sequence[tuple[Source, Plans]], plan: Plans | None) -> list[Lesson]:
    """Each source of features with the plans to learn on it."""
    if isinstance(trajectories, str | Path) or not (
        hasattr(trajectories, "batches") or isinstance(trajectories, Sequence)
    ):
        raise ValueError(
            f"trajectories must be what lesa.collect returned, or lesa.Trajectories.load(folder) of its folder, not a "
            f"{type(trajectories).__name__}; inner products are fitted by lesa.fit_gram"
        )
    if not isinstance(trajectories, Sequence):
        if plan is None:
            raise ValueError("say which steps are full: plan=StepPlan.paper(50, interval=7)")
        trajectories = [(trajectories, plan)]
    elif plan is not None:
        raise ValueError("the plans come with the trajectories, as pairs; leave plan= away")
    return [(source, [plans] if isinstance(plans, StepPlan) else list(plans)) for source, plans in trajectories]


def _on_own_steps(source: Source, plans: list[StepPlan], stream: Stream | None) -> Lesson:
    """A lesson on the steps that the stream takes part in."""
    if not isinstance(source, Trajectories):
        return source, plans
    chosen = source.stream(stream)
    first, own = source.firsts[chosen], source.of(chosen)
    if (first, own.num_steps) == (0, source.num_steps):
        return source, plans
    for plan in plans:
        if plan.num_steps != source.num_steps:
            raise ValueError(
                f"plan has {plan.num_steps} steps and the schedule {source.num_steps}, of which {'.'.join(chosen)} "
                f"takes part in {first} to {first + own.num_steps - 1}; give the plan of the whole schedule"
            )
    return own, [plan.within(first, own.num_steps) for plan in plans]


def _digest(predictor: LesaPredictor) -> str:
    """Of its weights: another start is another training."""
    digest = hashlib.sha256()
    for name, value in sorted(predictor.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check(lessons: list[Lesson], config: LesaConfig, stream: Stream | None) -> None:
    if not lessons or not all(plans for _, plans in lessons):
        raise ValueError("there are no trajectories, or no plan for them")
    for source, plans in lessons:
        source.stream(stream)
        for plan in plans:
            steps = {"plan": plan.num_steps, "trajectories": source.num_steps}
            steps |= {} if config.anchors else {"config": config.num_steps or 0}
            if len(set(steps.values())) > 1:
                raise ValueError(f"plan, config and trajectories must have the same number of steps, not {steps}")
            if not plan.predicted_steps:
                raise ValueError("every step of this plan is full; there is nothing to learn")
    if config.anchors is None and not all(same_times(source.times, lessons[0][0].times) for source, _ in lessons):
        raise ValueError("these trajectories have several schedules, which takes config=LesaConfig(anchors=16)")


def _batches(
    lessons: list[Lesson], size: int, stream: Stream | None, *, seed: int, skip: int, part: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor, StepPlan]]:
    """All batches of an epoch but the first ``skip``, the lessons in random turns: features, times, and a plan."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.tensor([i for i, (source, _) in enumerate(lessons) for _ in range(source.num_batches(size))])
    turns = turns[torch.randperm(len(turns), generator=generator)]
    draws = torch.rand(len(turns), generator=generator)
    sources = [
        source.batches(size, stream=stream, seed=seed, skip=int((turns[:skip] == i).sum()), part=part)
        for i, (source, _) in enumerate(lessons)
    ]
    for lesson, draw in zip(turns[skip:].tolist(), draws[skip:].tolist(), strict=True):
        source, plans = lessons[lesson]
        yield next(sources[lesson]), source.times, plans[int(draw * len(plans))]


def _train_on(
    state: Progress,
    features: Tensor,
    times: Tensor,
    plan: StepPlan,
    accelerator: Processes | None,
    *,
    closed: bool,
    relative: bool,
) -> float:
    """One update for each interval, on this process's features [samples, steps, *feature]; the mean error."""
    true = features.transpose(0, 1).contiguous()
    window = true.clone() if closed else true
    errors = []
    for interval in intervals(plan):
        error = interval_error(state.predictor, times, interval, true, window, closed=closed)
        state.optimizer.zero_grad()
        error.backward()
        count = torch.tensor(float(true[interval[0]].numel() * len(interval)), dtype=torch.float64)
        errors.append(_mean_over_all(state.predictor, error.detach(), count, accelerator, relative))
        torch.nn.utils.clip_grad_norm_(state.predictor.parameters(), 1.0)
        state.optimizer.step()
    total, count = torch.stack(errors).sum(0).tolist()
    return total / count


def _mean_over_all(
    predictor: LesaPredictor, error: Tensor, count: Tensor, accelerator: Processes | None, relative: bool
) -> Tensor:
    """Turns the gradients of a sum over this process's elements into those of the mean over all, or of its logarithm.

    Returns [sum, count] over all. One message for all gradients: each is a few thousand numbers, whose latency would
    add up.
    """
    gradients = [p.grad for p in predictor.parameters() if p.grad is not None]
    message = torch.cat(
        [g.flatten().double() for g in gradients] + [torch.stack([error.double(), count.to(error.device)])]
    )
    if accelerator is not None:
        message = accelerator.reduce(message, reduction="sum")
    scale = message[-2].clamp(min=torch.finfo(message.dtype).tiny) if relative else message[-1]
    parts = (message[:-2] / scale).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return message[-2:]


def _scale(features: Tensor, plan: StepPlan) -> Tensor:
    """One over the standard deviation of each channel: of normal features 99.7 % lie within the grid, -3 to 3."""
    return 1 / features[:, list(plan.full_steps)].float().flatten(0, -2).std(0).clamp(min=1e-6)
