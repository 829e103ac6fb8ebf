"""The noise levels of a generation, in one unit for every scheduler of diffusers.

A sample is a mixture ``a * image + s * noise``; its noise level is ``s / (a + s)``, from 1 pure noise to 0 the image.
Flow matching mixes with a = 1 - t and s = t, so there it is the time t itself. Where a = 1 and s = sigma grows
(Euler, Heun, EDM), it is ``sigma / (1 + sigma)``; where a^2 + s^2 = 1 (DDPM, DDIM), it follows from the product of
alphas at each timestep.
"""

from typing import Any

from torch import Tensor

from lesa.tables.times import as_times


def noise_levels(scheduler: Any) -> Tensor:
    """Noise levels [steps + 1] float64 of the generation that a scheduler is set to, on the host.

    A step is one evaluation of the model: solvers of second order have two of most intervals.

    Raises:
        ValueError: if the schedule does not fall from noise to image, as in inversion.
    """
    count = len(scheduler.timesteps)
    sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
    alphas: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    if any(
        kind.__name__ == "SCMScheduler" for kind in type(scheduler).__mro__
    ):  # a = cos and s = sin of its timesteps, the last being the image's
        angles = scheduler.timesteps.double()
        return as_times(_level(angles.sin() / angles.cos().clamp(min=0)), count - 1)
    if sigmas is not None and len(sigmas) == count + 1:
        sigmas = sigmas.double()
        if not _is_flow(scheduler, sigmas):
            return as_times(_level(sigmas), count)
        # Mochi, OmniGen and MiniMax-Music count from the noise: 0 to 1
        return as_times(1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas, count)
    if alphas is not None:
        image = alphas.double()[scheduler.timesteps.round().long().to(alphas.device)]  # float ones may be 665.99
        return as_times(_level(((1 - image) / image).sqrt()), count)
    unit = 1 if float(scheduler.timesteps.max()) <= 1 else scheduler.config.get("num_train_timesteps", 1000)
    return as_times(scheduler.timesteps / unit, count)


def _level(ratio: Tensor) -> Tensor:
    """s / (a + s) from s / a, which is infinite for pure noise."""
    return 1 / (1 + 1 / ratio)


def _is_flow(scheduler: Any, sigmas: Tensor) -> bool:
    """Whether sigmas are times of flow matching; solvers for both kinds of model have a setting for it."""
    for setting in ("use_flow_sigmas", "use_flow_sigma"):
        if setting in scheduler.config:
            return bool(scheduler.config[setting])
    both = hasattr(scheduler, "alphas_cumprod") or "sigma_data" in scheduler.config
    return not both and float(sigmas.max()) <= 1
