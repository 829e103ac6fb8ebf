"""Evaluation: forecasters and plans compared with the full sampler, and the files and pictures that are written."""

import json
import math
import weakref

import pytest
import torch
from matplotlib import image as mpimg

import lesa
from lesa.cli.methods_by_name import default_plans, grid, plan_of
from lesa.evaluation import metrics, pictures
from lesa.evaluation.evaluate import evaluate
from lesa.evaluation.methods import FULL, predicted
from lesa.evaluation.metrics import Metric
from lesa.reports.columns import cells, console_table
from tests.lesa.adapters.diffusers import tiny

PLAN = lesa.StepPlan(tiny.STEPS, [0, 1, 4, 7])


def latents_of(output):
    """The latents of an output as images."""
    return output.images.unflatten(1, (1, -1)).sigmoid()  # [N, 1, tokens, channels]


def run(methods, calls=2, **options):
    """The rows of an evaluation on the tiny pipeline."""
    made = [tiny.arguments(batch=2, seed=i) for i in range(calls)]
    return evaluate(tiny.pipeline(), methods, made, images=latents_of, progress=False, **options)


def method(name="reuse", forecaster=None, plan=PLAN, plan_name="four"):
    """A method to evaluate, by default reuse."""
    return predicted(name, forecaster or lesa.Reuse(), plan, plan_name)


def test_the_full_sampler_comes_first_and_is_the_reference_of_the_others():
    full, reuse, taylor = run([method(), method("Taylor 1", lesa.Taylor(1))], metrics=["psnr", "ssim"])
    assert (full["method"], full["full_steps"], full["speedup_wall"], full["psnr"]) == ("full sampler", 10, 1.0, None)
    assert full["ssim"] == pytest.approx(1)
    assert reuse["full"] == list(PLAN.full_steps)
    assert reuse["speedup_ideal"] == 2.5
    assert reuse["samples"] == 4
    assert reuse["kept_bytes"] > 0
    assert taylor["kept_bytes"] == 2 * reuse["kept_bytes"]
    assert 0 < reuse["ssim"] < 1
    assert math.isfinite(reuse["psnr"])
    assert reuse["psnr"] != taylor["psnr"]
    assert full["environment"]["versions"]["torch"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_of_metrics_are_loaded_once_and_freed_at_the_end(monkeypatch, fails):
    loaded = []

    class Model:
        def __init__(self, name):
            loaded.append(weakref.ref(self))

        def __call__(self, image, text):
            return image.float().mean()

    def score(images, reference, call):
        scores = metrics.clip_score(images, reference, {"prompt": ["a cat"] * len(images)})
        if fails:
            raise KeyError("lost")
        return scores

    monkeypatch.setattr("torchmetrics.multimodal.clip_score.CLIPScore", Model)
    metric = Metric("score", score)
    if fails:
        with pytest.raises(KeyError):
            run([method()], metrics=[metric])
    else:
        run([method()], metrics=[metric])
    assert [model() for model in loaded] == [None]


def test_scores_are_means_over_all_images_of_all_calls():
    seen = []

    def brightness(images, reference, call):
        seen.append(call["prompt_embeds"].shape[0])
        return images.mean((1, 2, 3))

    metric = Metric("brightness", brightness)
    both = run([method()], metrics=[metric])[1]["brightness"]
    first = run([method()], calls=1, metrics=[metric])[1]["brightness"]
    assert seen == [2] * 6
    made = [latents_of(generate(seed)) for seed in range(2)]
    assert first == pytest.approx(float(made[0].mean()), abs=1e-6)
    assert both == pytest.approx(float(torch.cat(made).mean()), abs=1e-6)


def generate(seed):
    """The output of a call with reuse."""
    pipeline = tiny.pipeline()
    with lesa.enable(pipeline, lesa.Reuse(), PLAN):
        return pipeline(**tiny.arguments(batch=2, seed=seed))


def test_a_metric_that_needs_prompts_is_left_out_if_there_are_none():
    metric = Metric("taste", lambda images, reference, call: torch.ones(len(images)), needs_prompts=True)
    assert "taste" not in run([method()], calls=1, metrics=[metric])[1]


def test_all_rounds_are_timed_and_only_the_first_is_scored():
    rows = run([method()], calls=1, metrics=["psnr"], rounds=3, warm_up=True)
    assert rows[1]["samples"] == 2
    untimed = predicted("slow", lesa.Reuse(), PLAN, "four")
    untimed = type(untimed)(untimed.name, untimed.plan, untimed.enabled, timed=False)
    assert run([untimed], calls=1, metrics=["psnr"], rounds=3)[1]["psnr"] == pytest.approx(rows[1]["psnr"])


def test_rows_are_written_after_every_call(tmp_path):
    calls = []

    def broken(images, reference, call):
        calls.append(call)
        if len(calls) == 3:  # the full sampler in the second call
            raise KeyboardInterrupt
        return torch.ones(len(images))

    with pytest.raises(KeyboardInterrupt):
        run([method()], metrics=[Metric("broken", broken)], out=tmp_path)
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["samples"] for row in rows] == [2, 2]


@pytest.mark.parametrize(
    ("methods", "calls", "message"),
    [
        ([], 1, "methods"),
        ([method()], 0, "prompts"),
        ([method(), method()], 1, "same name and plan"),
        ([FULL], 1, "methods"),
    ],
)
def test_invalid_comparisons_are_refused_before_the_first_call(methods, calls, message):
    with pytest.raises(ValueError, match=message):
        run(methods, calls)


@pytest.fixture(scope="module")
def calibration():
    return lesa.calibrate(tiny.pipeline(), [tiny.arguments(seed=9)], search=False, progress=False)


def test_a_grid_compares_every_forecaster_on_every_plan(calibration):
    names = ["reuse", "taylor:order=1,variable=time", "least-squares:ridge=1e-4", "path-least-squares", "default"]
    methods = grid(names, ["paper:3", "even:4", "best:4"], calibration)
    assert [(m.plan, m.name) for m in methods[:2]] == [
        ("paper 3", "reuse"),
        ("paper 3", "taylor:order=1,variable=time"),
    ]
    assert len(methods) == 15
    rows = run(methods, calls=1, metrics=["psnr"])
    assert {row["full_steps"] for row in rows if row["plan"] != "paper 3"} == {10, 4}
    by_name = {row["method"]: row["psnr"] for row in rows if row["plan"] == "best 4"}
    assert by_name["default"] == by_name["path-least-squares"]
    assert by_name["default"] > by_name["reuse"]


def test_a_folder_may_be_given_as_a_forecaster(tmp_path, calibration):
    predictor = lesa.LesaPredictor(lesa.LesaConfig(tiny.STEPS, hidden_dim=4))
    predictor.plan = PLAN
    predictor.save_pretrained(tmp_path / "predictor")
    calibration.save(tmp_path / "calibration")
    methods = grid([str(tmp_path / "predictor")], ["own"])
    assert run(methods, calls=1, metrics=[])[1]["full"] == list(PLAN.full_steps)
    methods = grid([str(tmp_path / "calibration")], ["even:4"])
    assert run(methods, calls=1, metrics=[])[1]["full_steps"] == 4


@pytest.mark.parametrize(
    ("forecaster", "plan", "message"),
    [
        ("reuse", "paper", "no plan 'paper'"),
        ("reuse", "often:3", "no plan 'often:3'"),
        ("reuse", "best:4", "best:4 needs a calibration"),
        ("least-squares", "even:4", "least-squares needs a calibration"),
        ("taylor:2", "even:4", "taylor:name=value"),
    ],
)
def test_unknown_forecasters_and_plans_are_refused(forecaster, plan, message):
    with pytest.raises(ValueError, match=message):
        grid([forecaster], [plan])


def test_default_plans_have_as_many_full_steps_as_the_papers(calibration):
    assert default_plans(50, None) == ["paper:5", "paper:7", "paper:10", "even:13", "even:10", "even:8"]
    assert default_plans(50, calibration)[3:] == ["best:13", "best:10", "best:8"]
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    assert plan_of("paper:7", None, lesa.Reuse())(times) == lesa.StepPlan.paper(50, 7)


def test_pictures_are_drawn_and_not_empty(tmp_path, calibration):
    rows = run(grid(["reuse", "default"], ["even:4", "even:6"], calibration), calls=1, metrics=["psnr"])
    pictures.draw(tmp_path, rows)
    for name in ("quality", "plans"):
        assert mpimg.imread(tmp_path / f"{name}.png").std() > 0.05


def test_the_results_table_has_each_known_column_of_any_row():
    rows = [{"plan": "a", "method": "m", "psnr": None}, {"plan": "b", "method": "n", "psnr": 31.5, "unknown": 1}]
    assert cells(rows) == (["full steps", "method", "PSNR"], [["a", "m", ""], ["b", "n", "31.50 dB"]])
    assert console_table(rows, "title").row_count == 2


def test_results_before_an_interruption_are_kept(tmp_path):
    """In the file, and in the callback ``keep``, from which the demo writes its report."""
    kept, calls = [], []

    def stop(rows):
        kept.append(rows)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([method()], 3, out=tmp_path, keep=stop)
    assert [len(rows) for rows in kept] == [2, 2]
    assert json.loads((tmp_path / "evaluation.json").read_text())[1]["samples"] == kept[1][1]["samples"]
