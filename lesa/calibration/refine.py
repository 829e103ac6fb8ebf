"""``refine_plans``: sample with the best few plans of the search and keep the best one."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lesa.adapters.diffusers.attachment import Attachment
from lesa.adapters.diffusers.pipeline import describe_model
from lesa.adapters.diffusers.recorder import Prompt, call_arguments, prompt_list
from lesa.arguments import whole
from lesa.calibration.calibration import Calibration
from lesa.calibration.planning import candidate_plans
from lesa.runtime.accelerator import Accelerator

CANDIDATES = 6


def refine_plans(
    pipeline: Any,
    calibration: Calibration,
    prompts: Sequence[Prompt],
    full_steps: Sequence[int],
    *,
    candidates: int = CANDIDATES,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> dict[int, float]:
    """Sample with the best few plans of a budget and keep the one whose samples are closest to the full sampler's.

    The predicted error ignores that later full steps run on a slightly different path, so several plans are about as
    good. This decides between them, at the cost of one accelerated generation for each plan and prompt.

    Args:
        pipeline: what was calibrated.
        calibration: its plans of these budgets are replaced; save it to keep them.
        prompts: one call each, as for :func:`lesa.calibrate`; the prompts of the calibration will do.
        full_steps: the budgets.
        candidates: how many plans are tried for each.
        seed, options: as for :func:`lesa.calibrate`.
        progress: show a progress bar.

    Returns:
        For each budget the root mean square distance of its samples from the full sampler's, relative to that of the
        plan with the smallest predicted error; 1 if that plan is kept.

    Raises:
        ValueError: if there are no prompts, or the calibration was made for another model.
    """
    prompts = prompt_list(prompts)
    whole("candidates", candidates, least=1)
    calibration.check_model(describe_model(pipeline))
    errors, times, forecasters = calibration.errors(), calibration.times, calibration.forecasters()
    rivals = {count: candidate_plans(errors, times, calibration.plan(count), candidates) for count in full_steps}
    distance = {plan: 0.0 for plans in rivals.values() for plan in plans}
    options = {"output_type": "latent", **options}
    with tqdm(total=len(prompts) * (len(distance) + 1), desc="trying plans", disable=not progress, delay=2) as bar:
        for index, prompt in enumerate(prompts):
            true = _sample(pipeline, call_arguments(prompt, seed + index, options))
            bar.update()
            for plan in distance:
                with Attachment(pipeline, Accelerator(forecasters, plan)):
                    made = _sample(pipeline, call_arguments(prompt, seed + index, options))
                distance[plan] += float((made - true).double().square().mean())
                bar.update()
    gains = {}
    for count, plans in rivals.items():
        best = min(plans, key=distance.__getitem__)
        gains[count] = (distance[best] / distance[plans[0]]) ** 0.5 if distance[plans[0]] else 1.0
        calibration.plans[count] = best
    return gains


def _sample(pipeline: Any, call: dict[str, Any]) -> Tensor:
    """The latents that a call returns."""
    made = pipeline(**{**call, "return_dict": False})[0]
    if not isinstance(made, Tensor):
        raise ValueError(f"plans are compared by latents, and the pipeline returned {type(made).__name__}")
    return made.float()
