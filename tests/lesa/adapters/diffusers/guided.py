"""A denoising loop with guidance."""

from contextlib import nullcontext

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.tiny import STEPS


class Guided:
    """A denoising loop with guidance and the attributes of a pipeline that the adapter reads.

    Args:
        transformers: used one after the other, in equal parts of the schedule.
    """

    def __init__(self, transformers=1):
        made = [tiny.pipeline(seed).transformer for seed in range(transformers)]
        self.components = {f"transformer_{i + 1}" if i else "transformer": t for i, t in enumerate(made)}
        self.scheduler = self.stepped_scheduler = FlowMatchEulerDiscreteScheduler()
        shared = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(3, 3)}
        self.conditions = {
            branch: {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8)} | shared
            for branch in ("cond", "uncond")
        }
        self.new_arguments = dict  # returns arguments that are new at every call
        self.branch = ""  # of the current call

    @torch.no_grad()
    def __call__(self, guided=range(STEPS), order=("cond", "uncond"), named=False, fresh=False):
        """The outputs by (branch, step); ``fresh``: the conditions are copied for every step."""
        self.scheduler.set_timesteps(STEPS)
        if self.stepped_scheduler is not self.scheduler:
            self.stepped_scheduler.set_timesteps(STEPS)
        latents, outputs = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)), {}
        for step, t in enumerate(self.scheduler.timesteps):
            transformer = list(self.components.values())[step * len(self.components) // STEPS]
            for self.branch in order:
                if self.branch == "uncond" and step not in guided:
                    continue
                conditions = self.conditions[self.branch] | self.new_arguments()
                if fresh:
                    conditions = {name: tensor.clone() for name, tensor in conditions.items()}
                with transformer.cache_context(self.branch) if named else nullcontext():
                    output = transformer(hidden_states=latents, timestep=t.expand(2) / 1000, **conditions).sample
                outputs[self.branch, step] = output
            latents = self.stepped_scheduler.step(outputs["cond", step], t, latents).prev_sample
        return outputs
