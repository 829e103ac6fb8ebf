"""Where diffusers runs a ``TaylorSeerCacheConfig``, the same full steps and expansion without running any block."""

import torch
from diffusers import TaylorSeerCacheConfig

import lesa
from lesa.demo.model import load_pipeline, sample

pipeline = load_pipeline()
reference = sample(pipeline, labels=[3], seeds=[0])

# whole blocks are cached, so that both predict the same thing
config = TaylorSeerCacheConfig(
    cache_interval=7,
    disable_cache_before_step=3,
    max_order=1,
    taylor_factors_dtype=torch.float32,
    cache_identifiers=[r"^transformer_blocks\.\d+$", r"^single_transformer_blocks\.\d+$"],
)
pipeline.transformer.enable_cache(config)
theirs = sample(pipeline, labels=[3], seeds=[0])
pipeline.transformer.disable_cache()

with lesa.enable(pipeline, *lesa.from_taylorseer_config(config)) as handle:
    ours = sample(pipeline, labels=[3], seeds=[0])
    print(handle.summary())

print(f"from each other {(ours - theirs).abs().max():.1e}, from the full sampler {(ours - reference).abs().max():.1e}")
