"""A tiny random FLUX pipeline, built offline."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

STEPS = 10


def pipeline(seed: int = 0) -> FluxPipeline:
    """The pipeline, with random weights that ``seed`` determines."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    made = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def arguments(
    batch: int = 2, seed: int = 0, steps: int = STEPS, guidance: float = 1.0, size: int = 64, device: Any = "cpu"
) -> dict[str, Any]:
    """The arguments of a call: random prompt embeddings instead of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt, negative = torch.randn(2, batch, 3, 8, generator=generator).to(device)
    made: dict[str, Any] = {
        "prompt_embeds": prompt,
        "pooled_prompt_embeds": prompt[:, 0],
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if guidance > 1:
        made |= {
            "true_cfg_scale": guidance,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative[:, 0],
        }
    return made


def generate(target: FluxPipeline, **options: Any) -> torch.Tensor:
    """The latents of a call."""
    return target(**arguments(**options)).images
