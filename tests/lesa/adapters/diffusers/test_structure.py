"""Derived classes, wrapped and replaced modules, and what remains when lesa is disabled or dropped."""

import copy
import gc
import weakref

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lesa
from lesa import LesaWarning, Reuse, StepPlan, Taylor
from lesa.adapters.diffusers import Attachment
from lesa.adapters.diffusers import attachment as attachment_module
from lesa.adapters.diffusers.models import MODEL_LAYOUTS, find_layout
from lesa.adapters.diffusers.output_heads import find_output_head
from lesa.adapters.diffusers.pipeline import describe_model
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.families import FAMILIES, Loop
from tests.lesa.adapters.diffusers.models import check
from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.models.row import exists
from tests.lesa.adapters.diffusers.probes import PLAN, call_at
from tests.lesa.adapters.diffusers.tiny import generate
from tests.lesa.strategies import schedule

PLAN12 = StepPlan(12, [0, 1, 4, 7])


def give_derived_class(module, **names):
    """Give an instance its own derived class, as users and FSDP2 do."""
    kind = type(module)
    module.__class__ = type(f"My{kind.__name__}", (kind,), names)
    return module


@pytest.mark.parametrize("name", [n for n, layout in MODEL_LAYOUTS.items() if not layout.refusal])
def test_a_derived_class_has_the_layout_of_its_base(name):
    base = type(name, (nn.Module,), {})
    assert find_layout(type("Sharded", (type("Mine", (base,), {}),), {})()) is MODEL_LAYOUTS[name]


def test_a_class_derived_from_a_refused_class_is_refused():
    base = type("Transformer2DModel", (nn.Module,), {})
    with pytest.raises(ValueError, match="part of a UNet"):
        find_layout(type("Mine", (base,), {})())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_derived_class_has_the_known_output_head_unless_forward_differs(name):
    transformer = Loop(name).transformer
    known = find_output_head(transformer)
    assert find_output_head(give_derived_class(transformer)) is known is not None
    forward = type(transformer).forward

    def longer(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    assert find_output_head(give_derived_class(transformer, forward=longer)) is None


def test_an_instance_with_its_own_forward_has_no_known_output_head():
    transformer = Loop("flux").transformer
    forward = transformer.forward
    transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert find_output_head(transformer) is None


DERIVED = ("LTX2VideoTransformer3DModel", "ZImageTransformer2DModel")


@pytest.mark.parametrize("name", [name for name in DERIVED if exists(name, ROWS[name])])
def test_a_derived_class_with_true_features_gives_the_outputs_of_full_steps(name):
    loop, recorder = check.Loop(name, ROWS[name]), check.Recorder()
    untouched = loop()
    give_derived_class(loop.transformer)
    with Attachment(loop, recorder):
        loop()
    with Attachment(loop, check.Oracle(check.PLAN, recorder.features)):
        assert check.equal(loop(), untouched)


def test_a_model_is_described_by_the_class_that_defines_its_forward(pipeline):
    plain = describe_model(pipeline.transformer)
    assert describe_model(give_derived_class(copy.deepcopy(pipeline.transformer))) == plain
    assert describe_model(torch.compile(pipeline.transformer, backend="eager")) == plain
    with lesa.enable(pipeline, Reuse(), PLAN):
        assert describe_model(pipeline.transformer) == plain
    other = give_derived_class(pipeline.transformer, forward=lambda self: None)
    assert describe_model(other) != plain


class LoRA(nn.Module):
    """A layer with an adapter, which gets the same input."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x, *args, **kwargs):
        result = self.base_layer(x, *args, **kwargs)
        return result + 0.1 * x.amax()


class Twice(nn.Module):
    """A block whose outputs are scaled."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        return tuple(1.5 * r for r in result) if isinstance(result, tuple) else 1.5 * result


HEADS = {
    "CogVideoXTransformer3DModel": "norm_final",
    "Cosmos3OmniTransformer": "proj_out",
    "FluxTransformer2DModel": "norm_out",
    "MiniMaxMusic3Transformer1DModel": "proj_out",
    "StableAudioDiTModel": "proj_out",
}


@pytest.mark.parametrize("name", [name for name in HEADS if name in ROWS and exists(name, ROWS[name])])
@pytest.mark.parametrize("head", [True, False], ids=["head", "block"])
def test_modules_wrapped_after_enable_are_found_at_the_next_generation(name, head, blocks_skipped):
    """With true features the outputs equal those of the wrapped model bit for bit, and then those of the plain one."""
    loop, recorder, wrapped = check.Loop(name, ROWS[name]), check.Recorder(), check.Recorder()
    transformer, where = loop.transformer, HEADS[name]
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList) and len(child)]
    plain = getattr(transformer, where) if head else lists[-1][0]

    def put(module):
        if head:
            setattr(transformer, where, module)
        else:
            lists[-1][0] = module

    untouched = loop()
    with Attachment(loop, recorder):
        loop()
    put(LoRA(plain) if head else Twice(plain))
    untouched_wrapped = loop()
    with Attachment(loop, wrapped):
        loop()
    put(plain)
    assert not check.equal(untouched, untouched_wrapped)
    oracle = check.Oracle(check.PLAN, recorder.features)
    with Attachment(loop, oracle):
        assert check.equal(loop(), untouched)
        put(LoRA(plain) if head else Twice(plain))
        oracle.features = wrapped.features
        assert check.equal(loop(), untouched_wrapped)
        put(plain)
        oracle.features = recorder.features
        assert check.equal(loop(), untouched)
    assert check.equal(loop(), untouched)
    assert not any(m._forward_pre_hooks or "_lesa_answer" in vars(m) for m in transformer.modules())


@pytest.mark.parametrize("change", ["wrap a head", "wrap a block", "wrap an embedder", "add an adapter"])
def test_a_model_that_changes_during_a_generation_runs_a_full_step(predicted_path, change):
    loop = Loop("flux")

    def alter(step, inputs):
        if step != 5:
            return
        transformer = loop.transformer
        if change == "wrap a head":
            transformer.norm_out = LoRA(transformer.norm_out)
        elif change == "wrap a block":
            transformer.single_transformer_blocks[0] = Twice(transformer.single_transformer_blocks[0])
        elif change == "wrap an embedder":
            transformer.time_text_embed.timestep_embedder = LoRA(transformer.time_text_embed.timestep_embedder)
        else:
            peft = pytest.importorskip("peft")
            transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))

    with lesa.enable(loop, Reuse(), PLAN12) as handle:
        loop(alter)
    assert (handle.records[0].full, handle.records[0].predicted) == ([0, 1, 4, 5, 7], [2, 3, 6, 8, 9, 10, 11])


def test_a_lora_on_a_head_is_applied_before_or_after_enable():
    peft = pytest.importorskip("peft")
    name, results = "StableAudioDiTModel", []
    for when in ("before", "after"):
        loop = check.Loop(name, ROWS[name])

        def load(loop=loop):
            torch.manual_seed(7)
            config = peft.LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, loop.transformer)

        if when == "before":
            load()
        with lesa.enable(loop, Taylor(1), check.PLAN):
            if when == "after":
                loop()
                load()
            results.append(loop())
    assert check.equal(*results)


@pytest.mark.parametrize("target", ["transformer", "block"])
@pytest.mark.parametrize("swap", ["derived", "parametrized", "compiled"])
def test_a_model_changed_while_enabled_works_after_disable(pipeline, blocks_skipped, target, swap):
    untouched = generate(pipeline)
    transformer = pipeline.transformer
    handle = lesa.enable(pipeline, Reuse(), PLAN)
    generate(pipeline)
    module = transformer if target == "transformer" else transformer.transformer_blocks[0]
    if swap == "derived":
        give_derived_class(module)
    elif swap == "parametrized":
        layer = nn.Identity()
        module.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
        parametrize.register_parametrization(module, "extra", layer)
    else:
        module.compile(backend="eager")
        generate(pipeline)
    handle.disable()
    torch.testing.assert_close(generate(pipeline), untouched)
    lesa.enable(pipeline, Reuse(), PLAN).disable()
    torch.testing.assert_close(generate(pipeline), untouched)
    if swap == "derived":
        copy.deepcopy(module)  # a copy is refused only while enabled


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyboardInterrupt])
def test_a_failing_enable_leaves_the_pipeline_unchanged(pipeline, monkeypatch, error):
    untouched = generate(pipeline)

    def fail(*_):
        raise error("failing")

    monkeypatch.setattr(attachment_module, "hook_heads", fail)
    with pytest.raises(error, match="failing"):
        lesa.enable(pipeline, Reuse(), PLAN)
    monkeypatch.undo()
    assert torch.equal(generate(pipeline), untouched)
    assert not any(m._forward_pre_hooks or "_lesa_answer" in vars(m) for m in pipeline.transformer.modules())
    with lesa.enable(pipeline, Reuse(), PLAN):
        generate(pipeline)


def test_disable_also_restores_a_transformer_that_was_replaced(pipeline):
    old, expected = pipeline.transformer, tiny.pipeline()
    lesa.enable(pipeline, Reuse(), PLAN)
    pipeline.transformer = tiny.pipeline(1).transformer
    lesa.disable(pipeline)
    pipeline.transformer = old
    assert torch.equal(generate(pipeline), generate(expected))
    assert not any(name.startswith("_lesa") for name in [*vars(pipeline), *vars(old)])


@pytest.mark.parametrize("output_head", ["known", "unknown"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_an_enabled_pipeline_is_freed_when_it_is_dropped(output_head, used, monkeypatch):
    if output_head == "unknown":
        monkeypatch.setattr("lesa.adapters.diffusers.output_heads.OUTPUT_HEADS", {})
    references = []
    for _ in range(2):
        pipeline = tiny.pipeline()
        references.append(weakref.ref(pipeline.transformer))
        lesa.enable(pipeline, Taylor(1), PLAN)
        if used:
            generate(pipeline)
        del pipeline
    gc.collect()
    assert [ref() for ref in references] == [None, None]


def test_features_are_freed_with_the_scheduler_of_a_failed_request(pipeline):
    """A request that failed outside of the transformer."""

    def fail(pipe, step, time, state):
        raise RuntimeError("stop here")

    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        request = diffusers.FluxPipeline(**pipeline.components)
        request.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        request.set_progress_bar_config(disable=True)
        with pytest.raises(RuntimeError, match="stop here"):
            request(**tiny.arguments(), callback_on_step_end=fail)
        assert handle.going_on != []
        del request
        gc.collect()
        assert handle.going_on == []


def test_each_handle_gives_a_warning_once_and_lists_it(pipeline):
    transformer = pipeline.transformer

    @torch.no_grad()
    def sample():
        for step, time in enumerate(schedule(10)[:-1]):
            call_at(transformer, time, batch=1 + step % 2)

    for _ in range(2):
        with lesa.enable(transformer, Reuse(), PLAN, times=schedule(10)) as handle:
            with pytest.warns(LesaWarning) as caught:
                sample()
            sample()
            assert handle.warnings == [str(caught[0].message)]
            assert handle.warnings[0] in handle.summary()


def test_the_repr_of_a_handle_has_its_state_and_steps(pipeline):
    handle = lesa.enable(pipeline, Taylor(1), PLAN)
    assert "enabled" in repr(handle)
    assert "no generation yet" in repr(handle)
    generate(pipeline)
    handle.disable()
    assert "disabled" in repr(handle)
    assert "transformer (cond): 4 full and 6 predicted" in repr(handle)
    assert len(repr(handle)) < 500
