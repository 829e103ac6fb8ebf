"""Every transformer class of diffusers, tiny and with random weights."""

import importlib
import json
import pkgutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import diffusers.models.transformers
import pytest
from diffusers import ConfigMixin, ModelMixin
from torch import nn

import lesa
from lesa import Reuse, Taylor
from lesa.adapters.diffusers import Attachment
from lesa.adapters.diffusers.models import MODEL_LAYOUTS, find_layout
from tests.lesa.adapters.diffusers.models.caches import CACHES, MAX_ERROR, outcome_of, outcome_of_lesa
from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.models.check import BRANCHES, PLAN, BlockRuns, Loop, Oracle, Recorder, equal
from tests.lesa.adapters.diffusers.models.row import exists

INSTALLED = [name for name, row in ROWS.items() if exists(name, row)]
REFUSED = [name for name, layout in MODEL_LAYOUTS.items() if layout.refusal]
COMMITTED = Path(__file__).parents[5] / "benchmarks" / "results" / "models.json"

pytestmark = pytest.mark.usefixtures("blocks_skipped_in_all_models")


@pytest.mark.parametrize("name", INSTALLED)
def test_predictions_with_true_features_equal_full_steps_and_run_no_block(name, support):
    loop, recorder = Loop(name, ROWS[name]), Recorder()
    untouched = loop()
    with Attachment(loop, recorder):
        assert equal(loop(), untouched)
    runs = BlockRuns(loop.transformer, ROWS[name].embedders)
    with Attachment(loop, Oracle(PLAN, recorder.features)):
        assert equal(loop(each=runs.store), untouched)
    assert {runs.stored[step, branch] for step in PLAN.predicted_steps for branch in BRANCHES} == {0}
    assert min(runs.stored[step, branch] for step in PLAN.full_steps for branch in BRANCHES) > 0
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        first = loop()
        assert [record.predicted for record in handle.records] == [list(PLAN.predicted_steps)] * 2
        assert equal(loop(), first)
    assert not equal(first, untouched)
    assert equal(loop(), untouched)
    support.setdefault(name, {})["heads"] = sorted({head for _, _, head in recorder.features})


@pytest.mark.parametrize("name", INSTALLED)
def test_caches_of_diffusers_give_the_results_of_the_committed_table(name, support):
    ours = outcome_of_lesa(name, ROWS[name])
    assert ours["runs"] == 0
    assert ours["error"] < MAX_ERROR
    support.setdefault(name, {})["caches"] = {"lesa": ours} | {
        cache: outcome_of(cache, name, ROWS[name]) for cache in CACHES
    }
    committed = json.loads(COMMITTED.read_text())
    if committed["environment"]["versions"]["diffusers"] == version("diffusers"):
        for cache, then in committed["models"][name]["caches"].items():
            now = support[name]["caches"][cache]
            assert now.keys() == then.keys(), (cache, now, then)
            assert now.get("runs") == then.get("runs"), (cache, now, then)
            assert (now.get("error", 0) < MAX_ERROR) == (then.get("error", 0) < MAX_ERROR), (cache, now, then)


def test_every_class_is_in_the_catalogue_or_refused_by_lesa():
    package = diffusers.models.transformers
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    classes = {
        name
        for module in modules
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, ModelMixin) and issubclass(cls, ConfigMixin)
        if cls.__module__ == module.__name__
    }
    assert classes - {name.split(":")[0] for name in ROWS} - set(REFUSED) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_class_is_refused_with_the_reason(name):
    model = type(name, (nn.Module,), {})()
    with pytest.raises(ValueError, match=MODEL_LAYOUTS[name].refusal):
        lesa.enable(model, Reuse(), PLAN)


def test_every_layout_is_for_a_class_in_the_catalogue_or_a_refused_one():
    names = {name.split(":")[0] for name in ROWS} | set(REFUSED)
    assert set(MODEL_LAYOUTS) <= names


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AnyFlowFARTransformer3DModel", {"kv_cache_flag": {"is_cache_step": True}}),
        ("SanaWMLTX2RefinerTransformer3DModel", {"kv_cache_mode": "capture_pre_rope"}),
        ("WanAnimate2Transformer3DModel", {"kv_cache_mode": "extract"}),
    ],
)
def test_a_call_that_only_fills_a_cache_is_not_a_step(name, arguments):
    layout = find_layout(type(name, (nn.Module,), {})())
    assert layout.fills_cache(arguments)
    assert not layout.fills_cache({})


@pytest.mark.skipif("GlmImageTransformer2DModel" not in INSTALLED, reason="this diffusers does not have it")
def test_filling_the_cache_of_glm_image_is_not_counted_as_a_step():
    name = "GlmImageTransformer2DModel"
    loop = Loop(name, ROWS[name])
    module = importlib.import_module(type(loop.transformer).__module__)
    cache = module.GlmImageKVCache(num_layers=2)
    cache.set_mode("write")
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop.transformer(**ROWS[name].inputs(0.0), kv_caches=cache)
        assert not handle.records
        loop()
    assert [record.predicted for record in handle.records] == [list(PLAN.predicted_steps)] * 2


@pytest.mark.skipif("Kandinsky6Transformer3DModel" not in INSTALLED, reason="this diffusers does not have it")
def test_a_head_that_a_generation_does_not_use_is_not_predicted():
    name = "Kandinsky6Transformer3DModel"
    loop, row = Loop(name, ROWS[name]), ROWS[name]
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        with_sound = loop()
        loop.row = replace(row, inputs=lambda t: {**row.inputs(t), "audio_hidden_states": None})
        without = loop()
        assert [record.predicted for record in handle.records] == [list(PLAN.predicted_steps)] * 2
        loop.row = row
        assert equal(loop(), with_sound)
    assert len(without[0, "cond"]) == 1
