"""``fit``: the two training stages of LESA on recorded trajectories.

Source: Cai et al., https://arxiv.org/abs/2602.20497. The base model is not needed; the loss is L1 to the true feature.

    guided       the window holds true features
    closed loop  between full steps it holds the predictor's own, detached predictions, as in sampling
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lesa.calibration.trajectories import Stream, Trajectories
from lesa.plan import StepPlan
from lesa.predictor import LesaConfig, LesaPredictor

STAGES = ("guided", "closed loop")
SAVE_EVERY_SECONDS = 5.0


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
    progress: bool = True,
) -> LesaPredictor:
    """Train a predictor for a plan on the features of one stream.

    Args:
        trajectories: true features of whole generations, from :func:`lesa.collect`.
        plan: the full steps that sampling will run.
        config: the shape of the predictor; None: the paper's, for this number of steps.
        stream: (component, branch), where several were recorded.
        epochs: passes over the samples in the guided and in the closed-loop stage.
        batch: samples an update sees.
        learning_rate: of AdamW, falling to zero along a cosine over all updates. The released recipe (1e-4, halved
            every 500 updates) leaves small models where they started.
        weight_decay: of AdamW.
        seed: of the initial weights and the order of samples; the same seed gives the same predictor.
        checkpoint: a file that keeps the state of the training. If it is there already, training goes on from it.
        progress: show a progress bar.

    Returns:
        The predictor, with ``schedule`` the times it was trained on and ``losses`` the curve of each stage: one mean
        absolute error for each batch.

    Raises:
        ValueError: if plan, config and trajectories have different numbers of steps, a feature holds NaN, the plan
            leaves nothing to predict, or the checkpoint belongs to another training.
    """
    config = config or LesaConfig(trajectories.num_steps)
    steps = {"plan": plan.num_steps, "config": config.num_steps, "trajectories": trajectories.num_steps}
    if len(set(steps.values())) > 1:
        raise ValueError(f"plan, config and trajectories must have the same number of steps, not {steps}")
    if not plan.predicted_steps:
        raise ValueError("every step of this plan is full; there is nothing to learn")
    torch.manual_seed(seed)
    predictor = LesaPredictor(config).train()
    if config.latent == "kan":
        predictor.scale = _scale(trajectories, stream, plan)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate, weight_decay=weight_decay)
    run = _Run(predictor, optimizer, losses={stage: [] for stage in STAGES})
    arguments = {
        "config": dataclasses.asdict(config),
        "full_steps": plan.full_steps,
        "samples": trajectories.samples,
        "settings": [epochs, batch, learning_rate, weight_decay, seed],
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.restore(path, arguments)

    intervals = list(_intervals(plan))
    trajectories.stream(stream)  # refuses a wrong one before the first update
    batches_per_epoch = trajectories.num_batches(batch)
    total = sum(epochs) * batches_per_epoch
    with tqdm(total=total, initial=run.batches, desc="fitting", disable=not progress, delay=2) as bar:
        for epoch in range(run.batches // batches_per_epoch, sum(epochs)):
            stage = STAGES[epoch >= epochs[0]]
            done = run.batches - epoch * batches_per_epoch
            for features in trajectories.batches(batch, stream=stream, seed=seed + epoch, skip=done):
                if not bool(features.isfinite().all()):
                    raise ValueError("a recorded feature holds NaN or infinity; collect these trajectories again")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * run.batches / total))
                loss = _train_on(run, features, trajectories.times, plan, intervals, closed=stage == STAGES[1])
                run.losses[stage].append(loss)
                run.batches += 1
                bar.update()
                bar.set_postfix(stage=stage, loss=f"{loss:.4f}", refresh=False)
                if path is not None:
                    run.save(path, arguments, only_if_due=run.batches < total)
    predictor.schedule = trajectories.times
    predictor.losses = run.losses
    return predictor.eval().requires_grad_(False)


def _train_on(
    run: "_Run", features: Tensor, times: Tensor, plan: StepPlan, intervals: list[range], *, closed: bool
) -> float:
    """One update for each interval of predicted steps, on features [samples, steps, *feature]; the mean loss."""
    predictor, config = run.predictor, run.predictor.config
    true = list(features.unbind(1))
    window = list(true)  # what the predictor sees: in the closed loop its own predictions take their place
    total = 0.0
    for interval in intervals:
        gates = predictor.gates(times)
        loss = torch.zeros(())
        for step in interval:
            stage = config.stage(float(times[step]))
            prediction = predictor.advance(window[:step], stage, gates[step])
            loss = loss + F.l1_loss(prediction, true[step])
            if closed:
                window[step] = prediction.detach()
        run.optimizer.zero_grad()
        (loss / len(interval)).backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        run.optimizer.step()
        total += loss.item()
    return total / len(plan.predicted_steps)


def _scale(trajectories: Trajectories, stream: Stream | None, plan: StepPlan) -> Tensor:
    """One over the standard deviation of each channel: of normal features 99.7 % lie within the grid, -3 to 3."""
    features = trajectories.shards[0][trajectories.stream(stream)][:, list(plan.full_steps)].float()
    return 1 / features.flatten(0, -2).std(0).clamp(min=1e-6)


def _intervals(plan: StepPlan) -> Iterator[range]:
    """The runs of consecutive predicted steps."""
    ends = (*plan.full_steps[1:], plan.num_steps)
    for full, end in zip(plan.full_steps, ends, strict=True):
        if end > full + 1:
            yield range(full + 1, end)


@dataclass
class _Run:
    """The state of a training, and its file: safetensors with the rest as JSON in the header."""

    predictor: LesaPredictor
    optimizer: torch.optim.Optimizer
    losses: dict[str, list[float]]
    batches: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

    def save(self, path: Path, arguments: dict[str, Any], *, only_if_due: bool) -> None:
        if only_if_due and time.monotonic() - self._saved_at < SAVE_EVERY_SECONDS:
            return
        tensors = {f"model.{k}": v for k, v in self.predictor.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
        metadata = {"losses": json.dumps(self.losses), "batches": str(self.batches), "arguments": json.dumps(arguments)}
        unfinished = path.with_suffix(".unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(unfinished), metadata)
        unfinished.replace(path)
        self._saved_at = time.monotonic()

    def restore(self, path: Path, arguments: dict[str, Any]) -> None:
        try:
            with safe_open(str(path), "pt") as file:
                metadata = {key: json.loads(value) for key, value in file.metadata().items()}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a complete training checkpoint ({error}); remove it to start anew"
            ) from error
        if metadata["arguments"] != json.loads(json.dumps(arguments)):
            raise ValueError(f"{path} belongs to a training with other arguments; remove it or name another file")
        self.losses, self.batches = metadata["losses"], metadata["batches"]
        self.predictor.load_state_dict(
            {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value.clone()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
