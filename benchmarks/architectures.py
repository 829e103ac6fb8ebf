"""Real transformers with random weights, and a denoising loop around them: a pipeline without text encoder and VAE.

Sizes are those of the published models, or tiny with the same structure. Models are built on the device in their dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One model at one size of image or video.

    Attributes:
        build: (blocks, tiny) -> the transformer and the arguments of its forward except the timestep.
        blocks: number of blocks of the published model in its longest list; other lists shrink in proportion.
        unit: the value of the timestep at noise level 1.
        blocks_measured: the blocks that are run in the available time on a large GPU; the others are extrapolated.
    """

    name: str
    build: Callable[[int, bool], tuple[nn.Module, Inputs]]
    blocks: int
    unit: int
    blocks_measured: int


def _flux(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import FluxTransformer2DModel

    if tiny:
        side, text, model = 4, 3, {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
        model |= {"in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2}
    else:
        side, text, model = 64, 512, {}
    made = FluxTransformer2DModel(
        num_layers=max(1, blocks // 2), num_single_layers=blocks, guidance_embeds=True, **model
    )
    config = made.config
    return made, {
        "hidden_states": torch.randn(1, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(0.0, side), torch.arange(0.0, side)),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5]),
    }


def _qwen_image(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import QwenImageTransformer2DModel

    if tiny:
        side, text = 4, 5
        model = {"in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "num_attention_heads": 3}
        model |= {"joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    else:
        side, text, model = 83, 128, {}
    made = QwenImageTransformer2DModel(num_layers=blocks, **model)
    return made, {
        "hidden_states": torch.randn(1, side * side, made.config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, made.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.long),
        "img_shapes": [(1, side, side)],
    }


def _hunyuan_video(latents: tuple[int, int, int]) -> Callable[[int, bool], tuple[nn.Module, Inputs]]:
    def build(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
        from diffusers import HunyuanVideoTransformer3DModel

        if tiny:
            size, text, model = (2, 8, 8), 6, {"num_attention_heads": 2, "attention_head_dim": 10}
            model |= {"in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "pooled_projection_dim": 8}
            model |= {"rope_axes_dim": (2, 4, 4), "num_refiner_layers": 1}
        else:
            size, text, model = latents, 256, {}
        made = HunyuanVideoTransformer3DModel(num_layers=max(1, blocks // 2), num_single_layers=blocks, **model)
        config = made.config
        return made, {
            "hidden_states": torch.randn(1, config.in_channels, *size),
            "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim),
            "encoder_attention_mask": torch.ones(1, text),
            "guidance": torch.tensor([6000.0]),
        }

    return build


def _wan(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import WanTransformer3DModel

    if tiny:
        size, text, model = (2, 8, 8), 6, {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}
        model |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "rope_max_seq_len": 32}
    else:
        size, text, model = (21, 90, 160), 512, {}
    made = WanTransformer3DModel(num_layers=blocks, **model)
    return made, {
        "hidden_states": torch.randn(1, made.config.in_channels, *size),
        "encoder_hidden_states": torch.randn(1, text, made.config.text_dim),
    }


# Latents of a video: frames, height and width after the VAE; a token is a patch of 2 x 2.
ARCHITECTURES = {
    made.name: made
    for made in (
        Architecture("FLUX.1-dev 1024", _flux, blocks=38, unit=1, blocks_measured=38),
        Architecture("Qwen-Image 1328", _qwen_image, blocks=60, unit=1, blocks_measured=60),
        Architecture("HunyuanVideo 480p", _hunyuan_video((17, 60, 80)), blocks=40, unit=1000, blocks_measured=8),
        Architecture("HunyuanVideo 720p", _hunyuan_video((33, 90, 160)), blocks=40, unit=1000, blocks_measured=2),
        Architecture("Wan 14B 720p", _wan, blocks=40, unit=1000, blocks_measured=2),
    )
}


class Loop:
    """A minimal pipeline for the adapter: a transformer, a scheduler, and a denoising loop.

    Args:
        architecture: the model to build.
        blocks: number of blocks.
        device, dtype: of the model.
        tiny: build a tiny model with the structure of the published one.
        steps: number of denoising steps.
    """

    def __init__(
        self, architecture: Architecture, blocks: int, device: str, dtype: torch.dtype, *, tiny: bool, steps: int
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # building in float32 first would take 80 GB for 20 billion parameters
        try:
            with torch.device(device):
                self.transformer, inputs = architecture.build(blocks, tiny)
        finally:
            torch.set_default_dtype(usual)
        self.transformer.eval().requires_grad_(False)
        self.inputs = {
            name: value.to(device, dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.architecture, self.device, self.dtype, self.steps = architecture, device, dtype, steps

    @torch.no_grad()
    def __call__(self, steps: int | None = None) -> Tensor:
        """The latents after the first ``steps`` steps; None: after all steps."""
        self.scheduler.set_timesteps(self.steps, device=self.device)
        latents = self.inputs["hidden_states"]
        for t in self.scheduler.timesteps[:steps]:
            timestep = t.expand(len(latents)).to(self.dtype)
            timestep = timestep / 1000 if self.architecture.unit == 1 else timestep
            arguments = self.inputs | {"hidden_states": latents, "timestep": timestep}
            with self.transformer.cache_context("cond"):
                velocity = self.transformer(**arguments, return_dict=False)[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        if self.transformer.is_cache_enabled:
            self.transformer._reset_stateful_cache()  # as pipelines do at the end of a call
        return latents

    @contextmanager
    def counted_full_steps(self) -> Iterator[list[None]]:
        """A list with an item for each run of the last block of the longest list, for any cache."""
        runs: list[None] = []
        lists = [module for module in self.transformer.children() if isinstance(module, nn.ModuleList)]
        inside = next(
            iter(max(lists, key=len)[-1].children())
        )  # a hook on a submodule: a skipped block is still called
        hook = inside.register_forward_pre_hook(lambda *_: runs.append(None))
        try:
            yield runs
        finally:
            hook.remove()
