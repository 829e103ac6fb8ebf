"""A forecaster inside cache-dit: its mask says which steps are full, the forecaster what the others add."""

import cache_dit

import lesa
from lesa.adapters.cache_dit import ForecasterConfig, steps_mask
from lesa.demo.model import load_pipeline, sample

plan = lesa.StepPlan.paper(50, interval=7)
pipeline = load_pipeline()
full = sample(pipeline, labels=[3], seeds=[0])


def error(calibrator_config):
    """How far the image is from the full sampler's."""
    cache_dit.enable_cache(
        pipeline,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            steps_computation_mask=steps_mask(plan),
            steps_computation_policy="static",
        ),
        calibrator_config=calibrator_config,
    )
    image = sample(pipeline, labels=[3], seeds=[0])
    cache_dit.disable_cache(pipeline)
    return (image - full).square().mean().sqrt()


print(f"cache-dit's TaylorSeer, order 1          {error(cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)):.4f}")
for forecaster in (lesa.Taylor(1), lesa.Taylor(2), lesa.FoCa()):
    print(f"{forecaster!r:40s} {error(ForecasterConfig(forecaster, pipeline)):.4f}")
