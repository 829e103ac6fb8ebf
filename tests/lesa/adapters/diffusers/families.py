"""Tiny random transformers of every family whose output head is known, and a denoising loop to drive them."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.lesa.adapters.diffusers.models.row import prompt_lengths

Inputs = dict[str, Any]


def flux(guidance: bool = False) -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    inputs: Inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 3, 8),
        "pooled_projections": torch.randn(2, 8),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return model, inputs | ({"guidance": torch.tensor([3.5, 2.0])} if guidance else {})


def qwen_image() -> tuple[nn.Module, Inputs]:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_hidden_states_mask": torch.ones(2, 5),
        "img_shapes": [(1, 4, 4)] * 2,
        **prompt_lengths(2, 5),
    }


def sd3() -> tuple[nn.Module, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=12,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 12),
    }


def hunyuan_video() -> tuple[nn.Module, Inputs]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.tensor([6000.0]),
    }


def wan() -> tuple[nn.Module, Inputs]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {"hidden_states": torch.randn(2, 4, 3, 8, 12), "encoder_hidden_states": torch.randn(2, 6, 16)}


def pixart() -> tuple[nn.Module, Inputs]:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit() -> tuple[nn.Module, Inputs]:
    model = diffusers.DiTTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_embeds_ada_norm=8,
        patch_size=2,
        sample_size=8,
        norm_type="ada_norm_zero",
    )
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([3, 5])}


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "flux": flux,
    "flux with guidance": lambda: flux(guidance=True),
    "qwen image": qwen_image,
    "sd3": sd3,
    "hunyuan video": hunyuan_video,
    "wan": wan,
    "pixart": pixart,
    "dit": dit,
}


class Loop:
    """A denoising loop with the attributes of a pipeline that the adapter reads: a transformer and a scheduler."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, steps: int = 12) -> None:
        torch.manual_seed(0)
        self.transformer, inputs = FAMILIES[name]()
        self.transformer.eval().requires_grad_(False).to(dtype)
        for parameter in self.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # some models start with an output of zero
        self.inputs = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.unit = 1000 if name in ("sd3", "hunyuan video", "wan", "pixart", "dit") else 1
        self.dtype, self.steps = dtype, steps

    @torch.no_grad()
    def __call__(self, change: Callable[[int, Inputs], None] = lambda step, inputs: None) -> list[Tensor]:
        """The transformer's outputs at every step; ``change`` may alter the inputs before it."""
        self.scheduler.set_timesteps(self.steps)
        inputs, outputs = dict(self.inputs), []
        for step, t in enumerate(self.scheduler.timesteps):
            change(step, inputs)
            latents = inputs["hidden_states"]
            timestep = t.expand(len(latents)).to(self.dtype)
            timestep = timestep / 1000 if self.unit == 1 else timestep
            output = self.transformer(timestep=timestep, **inputs, return_dict=False)[0]
            outputs.append(output)
            velocity = output[:, : latents.shape[1]] if output.ndim > 3 else output[..., : latents.shape[-1]]
            if velocity.shape[-1] < latents.shape[-1]:
                velocity = velocity.repeat(1, 1, latents.shape[-1] // velocity.shape[-1])
            inputs["hidden_states"] = self.scheduler.step(velocity, t, latents, return_dict=False)[0].to(self.dtype)
        return outputs
