import pytest

import lesa
from lesa import LesaWarning, Reuse, Taylor
from tests.lesa.adapters.probes import PLAN
from tests.lesa.adapters.tiny import generate


def test_kept_bytes_are_those_of_the_features_that_are_needed_at_once(pipeline):
    feature = 2 * 16 * 32 * 4  # batch x tokens x channels x float32
    for forecaster, features in ((Reuse(), 1), (Taylor(1), 2), (Taylor(2), 3)):
        with lesa.enable(pipeline, forecaster, PLAN) as handle:
            generate(pipeline)
        assert handle.records[0].kept_bytes == features * feature
    assert "4 full and 6 predicted steps, 2.50x ideal" in handle.summary()


def test_a_handle_without_a_generation_says_so(pipeline):
    with lesa.enable(pipeline, Reuse(), PLAN) as handle:
        assert handle.summary() == "no generation yet"


def test_a_generation_that_predicts_nothing_is_reported(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        pipeline.transformer.norm_out._forward_pre_hooks.clear()  # as if the blocks never reached the head
        with pytest.warns(LesaWarning, match="no step of transformer .* was predicted"):
            generate(pipeline)
