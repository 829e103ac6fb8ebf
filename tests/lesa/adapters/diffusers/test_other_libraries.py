"""Other libraries on the same transformer: offloading, casting, quantization, LoRA and other caches."""

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
    """As ``enable_sequential_cpu_offload`` for each model, whose device cpu:0 accelerate would take for a GPU."""
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


CHANGES = (
    model_offload,
    sequential_offload,
    group_offload,
    leaf_offload,
    layerwise_casting,
    int8_weights,
    int8_activations,
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_offloading_casting_and_quantization_do_not_change_predictions(pipeline, predicted_path, change, when):
    other = tiny.pipeline()
    change(other)
    untouched = generate(other, guidance=3.0)
    if when == "before":
        change(pipeline)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        if when == "after":
            change(pipeline)
        first = generate(pipeline, guidance=3.0)
        assert torch.equal(generate(pipeline, guidance=3.0), first)
        assert [r.predicted for r in handle.records] == [list(PLAN.predicted_steps)] * 2
    assert torch.equal(generate(pipeline, guidance=3.0), untouched)
    # bf16 storage or 8 bits change the predicted image about as much as the image without lesa
    plain = tiny.pipeline()
    rounding = (generate(plain, guidance=3.0) - untouched).abs().max()
    with lesa.enable(plain, Taylor(1), PLAN):
        difference = (generate(plain, guidance=3.0) - first).abs().max()
    assert difference <= 1.5 * rounding + 1e-5


def test_offloaded_blocks_are_not_loaded_for_predicted_steps(pipeline, blocks_skipped):
    """Blocks are skipped before any hook on them runs, also if offloading was enabled after lesa."""
    for when in ("before", "after"):
        target = tiny.pipeline()
        if when == "before":
            group_offload(target)
        with lesa.enable(target, Reuse(), PLAN):
            if when == "after":
                group_offload(target)
            loads = []
            for block in target.transformer.transformer_blocks:
                hook = block._diffusers_hook.get_hook("group_offloading")
                hook.fn_ref.pre_forward = counting(hook.fn_ref.pre_forward, loads)
            generate(target)
        assert len(loads) == 2 * len(PLAN.full_steps)


def counting(function, calls):
    """The function, with one entry in ``calls`` for each call."""

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


LAYERS = ["to_q", "proj_out", "norm_out.linear"]  # layers of the blocks and of the output head


def add_lora(pipeline, layers=LAYERS):
    """Add a random LoRA to the transformer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))


def test_a_lora_may_be_added_fused_and_removed_while_enabled(pipeline, predicted_path):
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
def test_a_cache_of_diffusers_and_lesa_are_refused_together(pipeline, name):
    transformer, config, apply = pipeline.transformer, CACHES[name](), getattr(hooks, name)
    transformer.enable_cache(config)
    with pytest.raises(ValueError, match=rf"{type(config).__name__}.*disable_cache"):
        lesa.enable(pipeline, Reuse(), PLAN)
    transformer.disable_cache()
    expected = generate(pipeline)
    with lesa.enable(pipeline, Reuse(), PLAN):
        with pytest.raises(ValueError, match=r"lesa is enabled.*lesa.disable"):
            transformer.enable_cache(config)
        apply(transformer, config)  # the function that enable_cache calls
        with pytest.raises(ValueError, match=r"another cache is enabled on this transformer \(.*Hook\)"):
            generate(pipeline)
    for module in transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)
    assert torch.equal(generate(pipeline), expected)
    transformer.enable_cache(config)
    transformer.disable_cache()


def test_cache_dit_and_lesa_are_refused_together(pipeline):
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
def test_group_offloading_from_a_gpu_gives_repeatable_images(predicted_path, kind, stream, when):
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
def test_offloading_from_a_gpu_gives_repeatable_images(predicted_path, offload):
    pipeline = tiny.pipeline()
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        getattr(pipeline, offload)()
        first = generate(pipeline)
        assert torch.equal(generate(pipeline), first)
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
