import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache

import lesa
from lesa import Reuse
from tests.lesa.adapters.probes import PLAN
from tests.lesa.adapters.tiny import generate


def test_a_cache_of_diffusers_is_not_mixed_with_ours(pipeline):
    transformer = pipeline.transformer
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache"):
        lesa.enable(pipeline, Reuse(), PLAN)
    transformer.disable_cache()
    expected = generate(pipeline)
    with lesa.enable(pipeline, Reuse(), PLAN):
        with pytest.raises(ValueError, match=r"lesa is enabled.*lesa.disable"):
            transformer.enable_cache(FirstBlockCacheConfig())
        apply_first_block_cache(transformer, FirstBlockCacheConfig())  # what enable_cache calls
        with pytest.raises(ValueError, match="FBCHeadBlockHook"):
            generate(pipeline)
    for module in transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)
    assert torch.equal(generate(pipeline), expected)
    transformer.enable_cache(FirstBlockCacheConfig())
    transformer.disable_cache()
