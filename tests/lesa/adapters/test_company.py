import pytest

import lesa
from lesa import Reuse
from tests.lesa.adapters.probes import PLAN


def test_a_cache_of_diffusers_is_not_mixed_with_ours(pipeline):
    from diffusers import FirstBlockCacheConfig

    pipeline.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache"):
        lesa.enable(pipeline, Reuse(), PLAN)
    pipeline.transformer.disable_cache()
    lesa.enable(pipeline, Reuse(), PLAN).disable()
