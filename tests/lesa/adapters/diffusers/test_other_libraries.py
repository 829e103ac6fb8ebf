"""Offloading, LoRA, quantisation and other caches, applied before or after lesa is enabled."""

import diffusers
import pytest
import torch
from diffusers import hooks

import lesa
from lesa import Reuse, Taylor
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.probes import PLAN
from tests.lesa.adapters.diffusers.tiny import generate

CPU = torch.device("cpu")


def model_offload(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipeline):
    """What ``enable_sequential_cpu_offload`` does to each model; it says cpu:0, which accelerate takes for a GPU."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(pipeline.transformer, CPU)
    assert pipeline.transformer.proj_out.weight.is_meta


def group_offload(pipeline, kind="block_level"):
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    try:
        pipeline.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)
    except AttributeError:
        if torch.accelerator.is_available():
            raise
        pytest.skip("this diffusers offloads groups only to an accelerator")


def leaf_offload(pipeline):
    group_offload(pipeline, "leaf_level")


def layerwise_casting(pipeline):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def int8_weights(pipeline):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipeline.transformer, quantization.Int8WeightOnlyConfig())


def int8_activations(pipeline):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipeline.transformer, quantization.Int8DynamicActivationInt8WeightConfig())


COMPANIONS = (
    model_offload,
    sequential_offload,
    group_offload,
    leaf_offload,
    layerwise_casting,
    int8_weights,
    int8_activations,
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("companion", COMPANIONS)
def test_offloading_and_other_weight_storage_change_no_prediction(pipeline, way, companion, when):
    other = tiny.pipeline()
    companion(other)
    untouched = generate(other, guidance=3.0)
    if when == "before":
        companion(pipeline)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        if when == "after":
            companion(pipeline)
        first = generate(pipeline, guidance=3.0)
        assert torch.equal(generate(pipeline, guidance=3.0), first)
        assert [r.predicted for r in handle.records] == [list(PLAN.predicted_steps)] * 2
    assert torch.equal(generate(pipeline, guidance=3.0), untouched)
    # to within what bf16 storage or 8 bits change in the untouched image, it is that of the plain pipeline
    plain = tiny.pipeline()
    rounding = (generate(plain, guidance=3.0) - untouched).abs().max()
    with lesa.enable(plain, Taylor(1), PLAN):
        difference = (generate(plain, guidance=3.0) - first).abs().max()
    assert difference <= 1.5 * rounding + 1e-5


def test_offloaded_blocks_are_not_moved_for_predicted_steps(pipeline, blocks_skipped):
    """Also if offloading is enabled after lesa: blocks return their inputs before any hook of theirs runs."""
    for when in ("before", "after"):
        target = tiny.pipeline()
        if when == "before":
            group_offload(target)
        with lesa.enable(target, Reuse(), PLAN):
            if when == "after":
                group_offload(target)
            brought = []
            for block in target.transformer.transformer_blocks:
                hook = block._diffusers_hook.get_hook("group_offloading")
                hook.fn_ref.pre_forward = counting(hook.fn_ref.pre_forward, brought)
            generate(target)
        assert len(brought) == 2 * len(PLAN.full_steps)


def counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


LAYERS = ["to_q", "proj_out", "norm_out.linear"]  # inside blocks, and the end that predicted steps use


def add_lora(pipeline, layers=LAYERS):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))


def test_a_lora_may_be_loaded_fused_and_unloaded_while_enabled(pipeline, way):
    expected = {}
    for name in ("without", "with"):
        fresh = tiny.pipeline()
        if name == "with":
            add_lora(fresh)
        with lesa.enable(fresh, Taylor(1), PLAN):
            expected[name] = generate(fresh)
    assert not torch.allclose(expected["with"], expected["without"], atol=1e-3)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        assert torch.equal(generate(pipeline), expected["without"])
        add_lora(pipeline)
        assert torch.equal(generate(pipeline), expected["with"])
        pipeline.fuse_lora(components=["transformer"])
        torch.testing.assert_close(generate(pipeline), expected["with"], rtol=1e-4, atol=1e-4)
        pipeline.unfuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
        torch.testing.assert_close(generate(pipeline), expected["without"], rtol=1e-4, atol=1e-4)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
    assert not hasattr(pipeline.transformer, "peft_config")


CACHES = {
    "apply_first_block_cache": lambda: diffusers.FirstBlockCacheConfig(),
    "apply_mag_cache": lambda: diffusers.MagCacheConfig(mag_ratios=[1.0] * tiny.STEPS, num_inference_steps=tiny.STEPS),
}


@pytest.mark.parametrize("name", [name for name in CACHES if hasattr(hooks, name)])
def test_a_cache_of_diffusers_is_refused_beside_lesa(pipeline, name):
    transformer, config, apply = pipeline.transformer, CACHES[name](), getattr(hooks, name)
    transformer.enable_cache(config)
    with pytest.raises(ValueError, match=rf"{type(config).__name__}.*disable_cache"):
        lesa.enable(pipeline, Reuse(), PLAN)
    transformer.disable_cache()
    expected = generate(pipeline)
    with lesa.enable(pipeline, Reuse(), PLAN):
        with pytest.raises(ValueError, match=r"lesa is enabled.*lesa.disable"):
            transformer.enable_cache(config)
        apply(transformer, config)  # what enable_cache calls
        with pytest.raises(ValueError, match=r"another cache is enabled on this transformer \(.*Hook\)"):
            generate(pipeline)
    for module in transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)
    assert torch.equal(generate(pipeline), expected)
    transformer.enable_cache(config)
    transformer.disable_cache()


def test_cache_dit_is_refused_beside_lesa(pipeline):
    cache_dit = pytest.importorskip("cache_dit")
    cache_dit.enable_cache(pipeline)
    with pytest.raises(ValueError, match="cache-dit"):
        lesa.enable(pipeline, Reuse(), PLAN)
    cache_dit.disable_cache(pipeline)
    lesa.enable(pipeline, Reuse(), PLAN).disable()


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("stream", [False, True])
def test_group_offload_from_a_gpu(way, kind, stream, when):
    pipeline, gpu = tiny.pipeline(), torch.device("cuda")
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload():
        pipeline.transformer.enable_group_offload(
            onload_device=gpu, offload_device=CPU, offload_type=kind, use_stream=stream, **groups
        )

    if when == "before":
        offload()
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        if when == "after":
            offload()
        first = generate(pipeline, device=gpu)
        assert torch.equal(generate(pipeline, device=gpu), first)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
    assert next(pipeline.transformer.parameters()).device == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_from_a_gpu(way, offload):
    pipeline = tiny.pipeline()
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        getattr(pipeline, offload)()
        first = generate(pipeline)
        assert torch.equal(generate(pipeline), first)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
