"""Trains the demo model by flow matching on digits: ``python -m benchmarks.demo.training`` writes its weights.

Flow matching (Lipman et al., https://arxiv.org/abs/2210.02747), as in FLUX: the input of the model is
x_t = (1 - t) x + t noise and its target the velocity noise - x. Times are logit-normal, then shifted as in sampling
(Esser et al., https://arxiv.org/abs/2403.03206). One label in ten is dropped for classifier-free guidance.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from lesa.demo.digits import IMAGE_SIZE, NUM_CLASSES, agreement, load_digits
from lesa.demo.model import PROMPT_DIM, TIME_SHIFT, WEIGHTS, build_pipeline, embed, sample

NULL_SHARE = 0.1
EMA_DECAY = 0.999
WARMUP_UPDATES = 200
EVALUATED_SAMPLES = 500


def pack(images: Tensor) -> Tensor:
    """Images [N, 1, 8, 8] as FLUX tokens [N, 16, 4]."""
    tokens: Tensor = FluxPipeline._pack_latents(images, *images.shape)
    return tokens


def build_transformer() -> FluxTransformer2DModel:
    """The demo's architecture with random weights."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=PROMPT_DIM,
        pooled_projection_dim=PROMPT_DIM,
        axes_dims_rope=(4, 14, 14),
    )


def random_times(count: int) -> Tensor:
    """Times [count] in (0, 1), distributed like the steps of a sampler with the time shift."""
    t = torch.sigmoid(torch.randn(count))
    shift = math.exp(TIME_SHIFT)
    return shift * t / (1 + (shift - 1) * t)


def flow_matching_loss(model: FluxTransformer2DModel, images: Tensor, labels: Tensor) -> Tensor:
    """Mean squared velocity error on images [N, 1, 8, 8] at random times."""
    x, prompt, t = pack(images), embed(labels), random_times(len(images))
    noise = torch.randn_like(x)
    half = IMAGE_SIZE // 2  # a token is a patch of 2 x 2 pixels
    velocity = model(
        hidden_states=torch.lerp(x, noise, t[:, None, None]),
        encoder_hidden_states=prompt[:, None],
        pooled_projections=prompt,
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(len(x), half, half, x.device, x.dtype),
        txt_ids=torch.zeros(1, 3),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - x)


def train(updates: int, batch: int, learning_rate: float, seed: int) -> FluxTransformer2DModel:
    """The exponential moving average of the weights after ``updates`` AdamW steps."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    model = build_transformer().train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)

    def schedule(update: int) -> float:
        return min(1.0, (update + 1) / WARMUP_UPDATES) * (0.5 + 0.5 * math.cos(math.pi * update / updates))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    smoothed = 0.0
    progress = trange(updates, desc="training the demo model", mininterval=2.0)
    for update in progress:
        chosen = torch.randint(len(images), (batch,))
        label = torch.where(torch.rand(batch) < NULL_SHARE, -1, labels[chosen])
        loss = flow_matching_loss(model, images[chosen], label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        decay = min(EMA_DECAY, (update + 1) / (update + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smoothed += (loss.item() - smoothed) * max(0.01, 1 / (update + 1))
        progress.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
    return average.eval()


def main() -> None:
    """Train and save the model, and print how many samples a classifier recognises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "transformer")
    options = parser.parse_args()

    model = train(options.updates, options.batch, options.learning_rate, options.seed)
    model.save_pretrained(options.out)
    labels = torch.arange(EVALUATED_SAMPLES) % NUM_CLASSES
    images = sample(build_pipeline(model), labels.tolist(), range(EVALUATED_SAMPLES))
    print(f"a classifier of real digits agrees with {agreement(images, labels):.1%} of {EVALUATED_SAMPLES} samples")


if __name__ == "__main__":
    main()
