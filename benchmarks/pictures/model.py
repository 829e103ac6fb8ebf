"""The picture model: a FLUX of 5.2 M parameters that draws emoji of 32 x 32 pixels on ten backgrounds, as 64 tokens.

The pictures (``emoji64.npz``: 1,360 of 64 x 64 pixels on white, with their Unicode names) were rendered from the font
Noto Color Emoji by Google, SIL Open Font License 1.1. A "prompt" is the name of an emoji and a background, each an
embedding that was trained with the model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lesa.demo.model import build_pipeline

DATA = Path(__file__).parent / "emoji64.npz"
NAMES, BACKGROUNDS = 1360, 10
WIDTH = 192
SIZE = 128  # height and width for FluxPipeline, which makes 16 x 16 latents of them: 2 x 2 pixels each


def load_pictures() -> Tensor:
    """The emoji [1360, 3, 64, 64] uint8 on white."""
    with np.load(DATA) as data:
        return torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous()


def is_held_out(names: Tensor, backgrounds: Tensor) -> Tensor:
    """Pairs of a name and a background that the model is not trained on, one in ten."""
    return (names * 7 + backgrounds * 3) % 10 == 0


class Pictures:
    """The trained model in a ``FluxPipeline``.

    Args:
        folder: what ``python -m benchmarks.pictures.training`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
        self.pipeline = build_pipeline(transformer)
        embeddings = load_file(folder / "prompts.safetensors")
        self._names, self._backgrounds = embeddings["names"], embeddings["backgrounds"]

    def request(self, seeds: Sequence[int], *, num_steps: int, guidance: float = 1.0) -> dict[str, Any]:
        """The arguments of a pipeline call: a held-out pair of name and background for each seed."""
        pairs = torch.cartesian_prod(torch.arange(NAMES), torch.arange(BACKGROUNDS))
        held_out = pairs[is_held_out(*pairs.T)]
        chosen = held_out[[int(seed) * 7919 % len(held_out) for seed in seeds]]
        prompt = self._embed(chosen[:, 0], chosen[:, 1])
        arguments: dict[str, Any] = {
            "prompt_embeds": prompt,
            "pooled_prompt_embeds": prompt.sum(1),
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": num_steps,
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            "output_type": "latent",
        }
        if guidance > 1:
            null = self._embed(torch.full_like(chosen[:, 0], NAMES), torch.full_like(chosen[:, 1], BACKGROUNDS))
            arguments |= {
                "true_cfg_scale": guidance,
                "negative_prompt_embeds": null,
                "negative_pooled_prompt_embeds": null.sum(1),
            }
        return arguments

    def _embed(self, names: Tensor, backgrounds: Tensor) -> Tensor:
        return torch.stack([self._names[names], self._backgrounds[backgrounds]], 1)


def images_of(output: Any) -> Tensor:
    """The images [N, 3, 32, 32] in [0, 1] of what the pipeline returned."""
    latents = FluxPipeline._unpack_latents(output.images, SIZE, SIZE, 8)
    return F.pixel_shuffle(latents, 2).clamp(-1, 1).add(1).div(2)
