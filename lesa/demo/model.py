"""The demo's model: a small FLUX, built, loaded and sampled with nothing but diffusers' own classes.

``FluxTransformer2DModel`` with two double and four single blocks (1.29 M parameters) on 8 x 8 digits, which the
pipeline packs into 16 tokens of 4 values. The "prompt" is the digit as a one-hot vector; the zero vector is the null
class of classifier-free guidance. Sampling is ``FluxPipeline`` with FLUX.1-dev's time shift, mu = 1.15.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from lesa.demo.digits import IMAGE_SIZE, NUM_CLASSES, read
from lesa.evaluation.metrics import Call, Metric

WEIGHTS = Path(__file__).parent / "weights"
PROMPT_DIM = 16  # ten classes, padded to what the attention likes
TIME_SHIFT = 1.15  # FLUX.1-dev at 1024 x 1024
PIXELS_PER_LATENT = 8  # FluxPipeline's scale factor without a VAE


def build_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """``FluxPipeline`` without text encoders and VAE; the latents are the pixels."""
    # Equal shifts at both ends give mu = 1.15 at any token count; the default ones would give 0.459 for 16 tokens.
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=TIME_SHIFT, max_shift=TIME_SHIFT)
    pipeline = FluxPipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline() -> FluxPipeline:
    """The trained demo model from the weights that ship with the package."""
    return build_pipeline(FluxTransformer2DModel.from_pretrained(WEIGHTS / "transformer", local_files_only=True))


def embed(labels: Tensor) -> Tensor:
    """Classes [N] as prompt embeddings [N, 16]; a label of -1 is the null class, a zero vector."""
    one_hot = F.one_hot(labels.clamp(min=0), PROMPT_DIM).float()
    return one_hot * (labels >= 0).unsqueeze(1)


def unpack(tokens: Tensor) -> Tensor:
    """FLUX tokens [N, 16, 4] as images [N, 1, 8, 8]."""
    size = IMAGE_SIZE * PIXELS_PER_LATENT
    images: Tensor = FluxPipeline._unpack_latents(tokens, size, size, PIXELS_PER_LATENT)
    return images


def images_of(output: Any) -> Tensor:
    """The images [N, 1, 8, 8] in [0, 1] of what the pipeline returned, for comparisons."""
    return unpack(output.images).clamp(-1, 1).add(1).div(2)


def labels_in(call: Mapping[str, Any]) -> Tensor:
    """The digits [N] that a :func:`request` asks for."""
    labels: Tensor = call["pooled_prompt_embeds"].argmax(-1)
    return labels


def request(
    labels: Sequence[int], seeds: Sequence[int], *, num_steps: int = 50, guidance: float = 1.0
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call: one digit per label, each from its own seed."""
    prompt = embed(torch.as_tensor(labels))
    arguments: dict[str, Any] = {
        "prompt_embeds": prompt[:, None],
        "pooled_prompt_embeds": prompt,
        "height": IMAGE_SIZE * PIXELS_PER_LATENT,
        "width": IMAGE_SIZE * PIXELS_PER_LATENT,
        "num_inference_steps": num_steps,
        # one generator per image: a seed gives the same image in a batch of any size
        "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
        "output_type": "latent",
    }
    if guidance > 1.0:
        arguments |= {
            "true_cfg_scale": guidance,
            "negative_prompt_embeds": torch.zeros_like(prompt)[:, None],
            "negative_pooled_prompt_embeds": torch.zeros_like(prompt),
        }
    return arguments


def sample(pipeline: FluxPipeline, labels: Sequence[int], seeds: Sequence[int], **options: Any) -> Tensor:
    """Images [N, 1, 8, 8] from one pipeline call; ``options`` as in :func:`request`."""
    return unpack(pipeline(**request(labels, seeds, **options)).images)


def labels_of(seeds: range) -> Tensor:
    """The digit that each seed is asked for."""
    return torch.tensor(seeds) % NUM_CLASSES


def call_of(seeds: range, num_steps: int = 50) -> dict[str, Any]:
    """The pipeline call that draws a digit for each seed."""
    return request(labels_of(seeds).tolist(), seeds, num_steps=num_steps)


def _is_read_as_asked(images: Tensor, reference: Tensor, call: Call) -> Tensor:
    return (read(images * 2 - 1) == labels_in(call)).float()


digit_metric = Metric("classifier_agreement", _is_read_as_asked)
