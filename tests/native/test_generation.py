"""A denoising loop of a small FLUX on a GPU."""

import pytest
import torch

import lesa
from lesa import StepPlan, Taylor
from tests.native.conftest import no_host_wait

diffusers = pytest.importorskip("diffusers")
families = pytest.importorskip("tests.lesa.adapters.diffusers.families")

PLAN = StepPlan.paper(12, 4)


class Loop:
    """A FLUX of two blocks; what a step needs is on the GPU beforehand, so that only the model can wait."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        made, arguments = families.flux()
        self.transformer = made.to("cuda", dtype).eval().requires_grad_(False)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.arguments = {name: value.to("cuda", dtype) for name, value in arguments.items()}

    @torch.no_grad()
    def __call__(self, steps: int | None = None, wait: bool = True) -> torch.Tensor:
        self.scheduler.set_timesteps(PLAN.num_steps, device="cuda")
        self.scheduler.set_begin_index(0)
        latents, levels = self.arguments["hidden_states"], self.scheduler.sigmas.tolist()
        for i, t in enumerate(self.scheduler.timesteps.unbind()[:steps]):
            time = (t / 1000).expand(len(latents)).to(latents.dtype)
            arguments = self.arguments | {"hidden_states": latents, "timestep": time}
            if wait or i == 0:
                velocity = self.transformer(**arguments, return_dict=False)[0]
            else:
                with no_host_wait():
                    velocity = self.transformer(**arguments, return_dict=False)[0]
            latents = latents + (levels[i + 1] - levels[i]) * velocity
            self.scheduler._step_index = i + 1
        return latents


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def loop(request):
    return Loop(request.param)


def test_no_call_after_the_first_of_a_generation_makes_the_host_wait(loop):
    with lesa.enable(loop, Taylor(2), PLAN) as handle:
        first = loop()
        assert torch.equal(loop(wait=False), first)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)


def test_evaluations_do_not_make_the_host_wait(loop):
    with lesa.enable(loop, evaluations=PLAN.num_steps, substeps=48, set_times=False):
        first = loop()
        assert torch.equal(loop(wait=False), first)


def test_autocast_to_fp16_gives_finite_latents_near_those_without():
    loop = Loop(torch.float32)
    with lesa.enable(loop, Taylor(2), PLAN):
        expected = loop()
        with torch.autocast("cuda", torch.float16):
            found = loop()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_steps_are_those_of_the_cpu_to_within_rounding(dtype):
    loop = Loop(dtype)
    with lesa.enable(loop, Taylor(1), PLAN):
        on_gpu = loop().cpu().float()
    reference = Loop(torch.float32)
    reference.transformer.load_state_dict(loop.transformer.state_dict())
    reference.arguments = {name: value.float() for name, value in loop.arguments.items()}
    with lesa.enable(reference, Taylor(1), PLAN):
        expected = reference().cpu()
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    assert float((on_gpu - expected).norm() / expected.norm()) < limit
