"""Trains the picture model by flow matching: ``python -m benchmarks.pictures.training --out DIR``.

The default, 260,000 pictures, takes 70 minutes on one core that multiplies bf16 matrices. Place, size, turn and
mirroring of an emoji vary with the seed; name and background are the prompt, and one in ten is dropped for guidance.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from benchmarks.pictures.model import BACKGROUNDS, NAMES, WIDTH, is_held_out, load_pictures

BATCH, WARMUP = 64, 300
LEARNING_RATE, DECAY = 1.5e-3, 0.9995
SAVED_EVERY = 500  # updates
COLOURS = (
    (255, 255, 255),
    (230, 60, 60),
    (60, 160, 70),
    (60, 100, 220),
    (250, 210, 60),
    (150, 80, 180),
    (250, 140, 40),
    (30, 30, 30),
    (120, 200, 230),
    (240, 150, 190),
)


class Model(nn.Module):
    """The transformer and the embeddings of its prompts; the last of each is the null prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(NAMES + 1, WIDTH)
        self.backgrounds = nn.Embedding(BACKGROUNDS + 1, WIDTH)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=48,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
        for embedding in (self.names, self.backgrounds):
            nn.init.normal_(embedding.weight, std=0.5)
        for name, module in self.transformer.named_modules():  # as in DiT: every block begins as the identity
            modulates = "norm" in name and name.endswith("linear")
            if isinstance(module, nn.Linear) and (modulates or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, names: Tensor, backgrounds: Tensor) -> Tensor:
        """Velocities [N, 64, 48] of noisy tokens at times [N]."""
        prompt = torch.stack([self.names(names), self.backgrounds(backgrounds)], 1)
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=prompt,
            pooled_projections=prompt.sum(1),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 8, 8, x.device, x.dtype),
            txt_ids=torch.zeros(2, 3),
            return_dict=False,
        )[0]
        return velocity


def pack(images: Tensor) -> Tensor:
    """Images [N, 3, 32, 32] as FLUX tokens [N, 64, 48]."""
    latents = F.pixel_unshuffle(images, 2)
    tokens: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return tokens


def draw(pictures: Tensor, backgrounds: Tensor, generator: torch.Generator) -> Tensor:
    """Emoji [N, 3, 64, 64] uint8, moved, scaled, turned and mirrored, on backgrounds: [N, 3, 32, 32] in [-1, 1]."""
    count, x = len(pictures), pictures.float()
    opaque = (255 - x.min(1, keepdim=True).values).clamp(0, 40) / 40  # white is background

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, size = uniform(-15, 15) * math.pi / 180, uniform(0.8, 1.1)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = angle.cos() / size, angle.sin() / size
    rows = [cosine * mirrored, -sine, uniform(-0.19, 0.19)], [sine * mirrored, cosine, uniform(-0.19, 0.19)]
    transform = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(transform, [count, 4, 64, 64], align_corners=False)
    moved = F.grid_sample(torch.cat([x * opaque, opaque], 1), grid, align_corners=False)
    moved = F.avg_pool2d(moved, 2)
    colour = torch.tensor(COLOURS, dtype=torch.float32)[backgrounds][:, :, None, None]
    return (moved[:, :3] + (1 - moved[:, 3:]) * colour) / 127.5 - 1


def train(images: int, out: Path, *, compiled: bool = False) -> float:
    """Train on so many pictures and write the average of the weights to ``out``; returns the last smoothed loss."""
    torch.manual_seed(0)
    generator, pictures = torch.Generator().manual_seed(0), load_pictures()
    model = Model().train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99))
    predict = torch.compile(model) if compiled else model
    updates, smoothed = max(1, images // BATCH), 0.0
    progress = trange(updates, desc="training the picture model", mininterval=2.0)
    for update in progress:
        rate = min(1, (update + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate + 1e-6
        names = torch.randint(0, NAMES, (BATCH,), generator=generator)
        backgrounds = torch.randint(0, BACKGROUNDS, (BATCH,), generator=generator)
        backgrounds = torch.where(is_held_out(names, backgrounds), (backgrounds + 1) % BACKGROUNDS, backgrounds)
        x = pack(draw(pictures[names], backgrounds, generator))
        dropped = torch.rand(BATCH, generator=generator) < 0.1
        names, backgrounds = names.masked_fill(dropped, NAMES), backgrounds.masked_fill(dropped, BACKGROUNDS)
        t = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.2)
        noise = torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = predict(torch.lerp(x, noise, t[:, None, None]), t, names, backgrounds)
        loss = F.mse_loss(velocity.float(), noise - x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(DECAY, 1 - 1 / (update / 10 + 2))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smoothed += (loss.item() - smoothed) * max(0.02, 1 / (update + 1))
        progress.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
        if (update + 1) % SAVED_EVERY == 0:
            save(average, out)
    save(average, out)
    return smoothed


def save(model: Model, out: Path) -> None:
    """Write what ``benchmarks.pictures.model.Pictures`` reads."""
    model.transformer.save_pretrained(out / "transformer")
    embeddings = {
        "names": model.names.weight.detach().clone(),
        "backgrounds": model.backgrounds.weight.detach().clone(),
    }
    save_file(embeddings, out / "prompts.safetensors")


def main() -> None:
    """Train the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=260_000)
    parser.add_argument("--compile", action="store_true", help="compile the model first; twice as fast after a minute")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(f"loss {train(options.images, options.out, compiled=options.compile):.4f}")


if __name__ == "__main__":
    main()
