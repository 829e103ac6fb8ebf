"""Tiny pipelines with embeddings as prompts, so that no text encoder is needed, and latents as results."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatchEuler

from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.models.row import build, noise

STEPS = 8
Made = tuple[Any, dict[str, Any]]  # a pipeline, and the arguments of a call


def transformer(name: str, **config: Any) -> Any:
    """The tiny model of the catalogue, with changes that a pipeline needs."""
    row = ROWS[name]
    return build(name, type(row)(row.config | config, row.inputs))


def pipeline(name: str, call: dict[str, Any], encoders: int = 1, **components: Any) -> Made:
    """A pipeline without text encoders."""
    missing = {"text_encoder": None, "tokenizer": None}
    missing |= {f"{part}_{n}": None for part in missing for n in range(2, encoders + 1)}
    components = {"scheduler": FlowMatchEuler(), "vae": None} | (missing if encoders else {}) | components
    made = getattr(diffusers, name)(**components)
    made.set_progress_bar_config(disable=True)
    return made, {"num_inference_steps": STEPS, "output_type": "latent"} | call


def vae(channels: int = 4) -> Any:
    """An autoencoder with 8 x 8 latents for 16 x 16 images."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def prompts(*shape: int, masks: tuple[str, str] | None = None, pooled: int = 0) -> dict[str, Any]:
    """Embeddings of a prompt and a negative prompt, with masks and pooled embeddings."""
    made: dict[str, Any] = {"prompt_embeds": noise(*shape), "negative_prompt_embeds": noise(*shape)}
    if masks is not None:
        made |= {name: torch.ones(shape[:2], dtype=torch.bool) for name in masks}
    if pooled:
        made |= {f"{sign}pooled_prompt_embeds": noise(shape[0], pooled) for sign in ("", "negative_")}
    return made


MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
SQUARE = {"height": 64, "width": 64}


def dit() -> Made:
    model = transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000)  # the pipeline's null class is 1000
    decoder = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    call = {"class_labels": [1, 2], "output_type": "np"}
    return pipeline("DiTPipeline", call, 0, transformer=model, vae=decoder.eval(), scheduler=diffusers.DDIMScheduler())


def pixart() -> Made:
    call = prompts(1, 5, 8, masks=MASKS) | SQUARE | {"negative_prompt": None, "use_resolution_binning": False}
    solver = diffusers.DPMSolverMultistepScheduler()
    return pipeline("PixArtSigmaPipeline", call, transformer=transformer("PixArtTransformer2DModel"), scheduler=solver)


def sd3() -> Made:
    call = prompts(1, 5, 16, pooled=12) | SQUARE
    return pipeline("StableDiffusion3Pipeline", call, 3, transformer=transformer("SD3Transformer2DModel"))


def flux() -> Made:
    call = prompts(1, 5, 16, pooled=8) | SQUARE | {"true_cfg_scale": 3.0}
    shifting = FlowMatchEuler(use_dynamic_shifting=True)
    return pipeline("FluxPipeline", call, 2, transformer=transformer("FluxTransformer2DModel"), scheduler=shifting)


def flux_img2img() -> Made:
    made = transformer("FluxTransformer2DModel", in_channels=16)
    call = prompts(1, 5, 16, pooled=8) | {"height": 32, "width": 32, "true_cfg_scale": 3.0, "strength": 0.75}
    call |= {"image": torch.rand(1, 3, 32, 32)}
    return pipeline("FluxImg2ImgPipeline", call, 2, transformer=made, vae=vae())


def inpaint(size: int) -> dict[str, Any]:
    """Inpainting of the right half of an image, without the first quarter of the schedule."""
    mask = (torch.arange(size) >= size // 2).float().expand(1, 1, size, size)
    return {"image": torch.rand(1, 3, size, size), "mask_image": mask, "strength": 0.75, "height": size, "width": size}


def flux_inpaint() -> Made:
    call = prompts(1, 5, 16, pooled=8) | inpaint(32) | {"true_cfg_scale": 3.0}
    model = transformer("FluxTransformer2DModel", in_channels=16)
    return pipeline("FluxInpaintPipeline", call, 2, transformer=model, vae=vae())


def sd3_inpaint() -> Made:
    # the pipeline accepts models of 16 channels, and of 33 channels with the mask
    model = transformer("SD3Transformer2DModel", in_channels=16, out_channels=16)
    call = prompts(1, 5, 16, pooled=12) | inpaint(16)
    return pipeline("StableDiffusion3InpaintPipeline", call, 3, transformer=model, vae=vae(channels=16))


def qwen_image_inpaint() -> Made:
    encoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    call = prompts(1, 5, 16, masks=("prompt_embeds_mask", "negative_prompt_embeds_mask")) | inpaint(32)
    model = transformer("QwenImageTransformer2DModel")
    return pipeline("QwenImageInpaintPipeline", call, transformer=model, vae=encoder.eval())


def z_image_inpaint() -> Made:
    call = {"prompt_embeds": [noise(5, 16)], "negative_prompt_embeds": [noise(5, 16)], "guidance_scale": 3.0}
    model = transformer("ZImageTransformer2DModel")
    return pipeline("ZImageInpaintPipeline", call | inpaint(32), transformer=model, vae=vae(channels=16))


def qwen_image() -> Made:
    call = prompts(1, 5, 16, masks=("prompt_embeds_mask", "negative_prompt_embeds_mask")) | SQUARE
    return pipeline("QwenImagePipeline", call, transformer=transformer("QwenImageTransformer2DModel"))


def wan(**components: Any) -> Made:
    call = prompts(1, 5, 16) | SQUARE | {"num_frames": 5}
    solver = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return pipeline(
        "WanPipeline", call, transformer=transformer("WanTransformer3DModel"), scheduler=solver, **components
    )


def wan_ti2v() -> Made:
    return wan(expand_timesteps=True)


def wan22() -> Made:
    return wan(transformer_2=transformer("WanTransformer3DModel"), boundary_ratio=0.8)


def hunyuan_video() -> Made:
    call = prompts(1, 6, 16, masks=("prompt_attention_mask", "negative_prompt_attention_mask"), pooled=8)
    call |= SQUARE | {"num_frames": 5, "true_cfg_scale": 3.0}
    return pipeline("HunyuanVideoPipeline", call, 2, transformer=transformer("HunyuanVideoTransformer3DModel"))


def ltx() -> Made:
    call = prompts(1, 5, 16, masks=MASKS) | SQUARE | {"num_frames": 9}
    return pipeline("LTXPipeline", call, transformer=transformer("LTXVideoTransformer3DModel"))


def z_image() -> Made:
    call = {"prompt_embeds": [noise(5, 16)], "negative_prompt_embeds": [noise(5, 16)], "guidance_scale": 3.0} | SQUARE
    return pipeline("ZImagePipeline", call, transformer=transformer("ZImageTransformer2DModel"))


def chroma() -> Made:
    call = prompts(1, 5, 16, masks=MASKS) | SQUARE
    return pipeline("ChromaPipeline", call, transformer=transformer("ChromaTransformer2DModel"))


def cogvideox() -> Made:
    call = prompts(1, 5, 8) | SQUARE | {"num_frames": 5, "max_sequence_length": 5}
    model = transformer("CogVideoXTransformer3DModel")
    return pipeline("CogVideoXPipeline", call, transformer=model, scheduler=diffusers.CogVideoXDDIMScheduler())


def sana() -> Made:
    call = prompts(1, 5, 8, masks=MASKS) | SQUARE | {"negative_prompt": None, "use_resolution_binning": False}
    solver = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return pipeline("SanaPipeline", call, transformer=transformer("SanaTransformer2DModel"), scheduler=solver)


def lumina2() -> Made:
    call = prompts(1, 5, 32, masks=MASKS) | SQUARE
    return pipeline("Lumina2Pipeline", call, transformer=transformer("Lumina2Transformer2DModel"))


PIPELINES: dict[str, Callable[[], Made]] = {
    "DiTPipeline": dit,
    "PixArtSigmaPipeline": pixart,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux_img2img,
    "FluxInpaintPipeline": flux_inpaint,
    "StableDiffusion3InpaintPipeline": sd3_inpaint,
    "QwenImageInpaintPipeline": qwen_image_inpaint,
    "ZImageInpaintPipeline": z_image_inpaint,
    "QwenImagePipeline": qwen_image,
    "WanPipeline": wan,
    "WanPipeline: 2.2, two transformers": wan22,
    "WanPipeline: 2.2, time of each token": wan_ti2v,
    "HunyuanVideoPipeline": hunyuan_video,
    "LTXPipeline": ltx,
    "ZImagePipeline": z_image,
    "ChromaPipeline": chroma,
    "CogVideoXPipeline": cogvideox,
    "SanaPipeline": sana,
    "Lumina2Pipeline": lumina2,
}
