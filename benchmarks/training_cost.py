"""Memory and time of training at the size of FLUX, and the loss of quality by bf16 and by subsets of tokens.

    python -m benchmarks.training_cost --out benchmarks/results/training_cost.json

Time: one epoch of a stage on the features of one prompt, [50, tokens, 3072] bf16, for the paper's plan N = 7 and gates
of width 256. It is compared with a loop like that of the released code: for each predicted step a stacked window, a
linear layer and an optimizer update, all in bf16. Quality: the PSNR of held-out digits of the demo model, for
predictors that were trained on the kept tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lesa
from lesa.demo.model import call_of, images_of, load_pipeline
from lesa.demo.run import CALIBRATION_SEEDS, CONFIG, HELD_OUT_SEEDS
from lesa.evaluation import metrics
from lesa.reports.environment import describe_environment
from lesa.training.checkpoint import TrainingState
from lesa.training.footprint import trajectory_bytes
from lesa.training.two_stage import STAGES, train_on

STEPS, CHANNELS, INTERVAL = 50, 3072, 7
PLAN = lesa.StepPlan.paper(STEPS, INTERVAL)
TOKENS = (512, 4096)  # 4096: all tokens of a 1024 x 1024 image
RELEASED_TOKENS = 512
HELD_OUT = HELD_OUT_SEEDS[:128]
KEPT: list[tuple[int | None, torch.dtype]] = [
    (None, torch.float32),
    (None, torch.bfloat16),
    (4, torch.bfloat16),
    (1, torch.bfloat16),
]


def times() -> Tensor:
    return torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def features(tokens: int) -> Tensor:
    """One sample [1, steps, tokens, channels] bf16 that changes slowly over the steps, like features of a model."""
    start, end = torch.randn(2, tokens, CHANNELS)
    weights = torch.linspace(0, 1, STEPS)
    return torch.stack([torch.lerp(start, end, w).bfloat16() for w in weights]).unsqueeze(0)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def ours(tokens: int, *, closed: bool, rounds: int) -> float:
    predictor = lesa.LesaPredictor(lesa.LesaConfig(STEPS))
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-4)
    state, sample = TrainingState(predictor, optimizer, {stage: [] for stage in STAGES}), features(tokens)
    return seconds(
        lambda: train_on(state, sample, times(), PLAN, None, closed=closed),
        rounds,
    )


def released(tokens: int, *, closed: bool) -> float:
    """The same epoch, implemented like the released code."""
    predictor = lesa.LesaPredictor(lesa.LesaConfig(STEPS)).bfloat16()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-4)
    true, offsets = list(features(tokens).unbind(1)), (times()[:-1, None] - times()).bfloat16()

    def epoch() -> None:
        window = list(true)
        for step in PLAN.predicted_steps:
            stage = predictor.config.stage(float(times()[step]))
            layer = predictor.layer(stage)
            past = window[max(0, step - layer.in_features) : step]
            stacked = torch.stack(past, -1)
            z = F.linear(stacked, layer.weight[:, -len(past) :], layer.bias).squeeze(-1)
            prediction = past[-1] + predictor.timestep[stage](offsets[step]) * z
            optimizer.zero_grad()
            F.l1_loss(prediction, true[step]).backward()
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            if closed:
                window[step] = prediction.detach()

    return seconds(epoch, 1)


def cost() -> list[dict[str, Any]]:
    rows = []
    for closed in (False, True):
        stage = STAGES[closed]
        for tokens in TOKENS:
            size = trajectory_bytes(1, STEPS, tokens, CHANNELS)
            taken = ours(tokens, closed=closed, rounds=3 if tokens < 4096 else 1)
            rows.append(
                {"kind": "time", "way": "lesa", "stage": stage, "tokens": tokens, "seconds": taken, "bytes": size}
            )
        size = trajectory_bytes(1, STEPS, RELEASED_TOKENS, CHANNELS)
        taken = released(RELEASED_TOKENS, closed=closed)
        rows.append(
            {
                "kind": "time",
                "way": "step by step",
                "stage": stage,
                "tokens": RELEASED_TOKENS,
                "seconds": taken,
                "bytes": size,
            }
        )
        for row in rows[-len(TOKENS) - 1 :]:
            print(row, flush=True)
    return rows


def quality() -> list[dict[str, Any]]:
    pipeline = load_pipeline()

    def sample() -> Tensor:
        return images_of(pipeline(**call_of(HELD_OUT)))

    full, rows = sample(), []
    for tokens, dtype in KEPT:
        # one call per digit, so that tokens are chosen for each digit
        calls = [call_of(range(seed, seed + 1)) for seed in CALIBRATION_SEEDS]
        recorded = lesa.collect(pipeline, calls, tokens=tokens, dtype=dtype, progress=False)
        joined = lesa.Trajectories(
            recorded.times, [{s: torch.cat([shard[s] for shard in recorded.shards]) for s in recorded.streams}]
        )
        predictor = lesa.fit(joined, PLAN, CONFIG, progress=False)
        with lesa.enable(pipeline, predictor, PLAN):
            psnr = float(metrics.psnr(sample(), full).mean())
        size = sum(f.nbytes for shard in joined.shards for f in shard.values())
        rows.append(
            {
                "kind": "quality",
                "tokens": tokens or full_tokens(recorded),
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": size,
                "psnr": psnr,
                "samples": len(HELD_OUT),
            }
        )
        print(rows[-1], flush=True)
    return rows


def full_tokens(recorded: lesa.Trajectories) -> int:
    return int(recorded.shards[0][recorded.stream()].shape[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--part", choices=("cost", "quality"), help="measure only this part; the other stays unchanged in --out"
    )
    options = parser.parse_args()
    parts = {"cost": cost, "quality": quality}
    chosen = list(parts) if options.part is None else [options.part]
    environment = describe_environment(["torch", "diffusers"])
    made = [row | {"environment": environment} for name in chosen for row in parts[name]()]
    if options.out is not None:
        old = json.loads(options.out.read_text()) if options.out.exists() and options.part else []
        kinds = {row["kind"] for row in made}
        options.out.write_text(json.dumps([r for r in old if r["kind"] not in kinds] + made, indent=1) + "\n")


if __name__ == "__main__":
    main()
