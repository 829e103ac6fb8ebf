import json

import pytest
import torch
from matplotlib import image as mpimg

from benchmarks.demo_training import flow_matching_loss
from lesa.demo.digits import NUM_CLASSES, agreement, load_digits
from lesa.demo.methods import DEFAULT
from lesa.demo.model import embed, load_pipeline, pack, sample, unpack
from lesa.demo.run import run_demo


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_digits_are_real_and_the_classifier_knows_them():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert labels.bincount().min() > 170
    assert agreement(images, labels) > 0.99
    assert agreement(images, (labels + 1) % NUM_CLASSES) < 0.01


def test_the_shipped_model_draws_the_digits_it_is_asked_for(pipeline):
    labels = torch.arange(100) % NUM_CLASSES
    assert agreement(sample(pipeline, labels.tolist(), range(100), num_steps=20), labels) >= 0.9


def test_guidance_has_a_null_class(pipeline):
    labels = torch.arange(20) % NUM_CLASSES
    guided = sample(pipeline, labels.tolist(), range(20), num_steps=10, guidance=2.0)
    assert agreement(guided, labels) >= 0.9
    assert embed(torch.tensor([-1, 3])).tolist() == [[0.0] * 16, [0.0, 0, 0, 1] + [0.0] * 12]


def test_a_seed_gives_the_same_digit_in_any_batch(pipeline):
    together = sample(pipeline, [1, 2, 3], [5, 6, 7], num_steps=5)
    torch.testing.assert_close(sample(pipeline, [2], [6], num_steps=5), together[1:2])


def test_sampling_follows_the_time_shift_of_flux(pipeline):
    sample(pipeline, [0], [0], num_steps=10)
    factor = torch.tensor(1.15).exp()
    t = torch.linspace(1, 0.1, 10)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1], factor * t / (1 + (factor - 1) * t))


def test_packing_is_undone_by_unpacking():
    images = torch.randn(3, 1, 8, 8)
    assert pack(images).shape == (3, 16, 4)
    assert torch.equal(unpack(pack(images)), images)


def test_the_training_loss_of_the_shipped_model_is_that_of_a_trained_one(pipeline):
    images, labels = load_digits()
    with torch.no_grad():
        assert flow_matching_loss(pipeline.transformer, images[:256], labels[:256]) < 0.4


def test_the_demo_writes_its_report_and_pictures(tmp_path, capsys):
    run_demo(tmp_path, held_out=40, batch=40, timing_rounds=0, intervals=(7,))
    rows = json.loads((tmp_path / "report.json").read_text())
    plans = {}
    for row in rows:
        plans.setdefault(row["plan"], {})[row["method"]] = row
    paper, best = plans["paper N=7"], plans["calibrated, 10 steps"]
    names = {"Taylor 2", "LESA", "least squares"}
    assert set(paper) == names | {"reuse", "Taylor 1", "LESA, KAN on features"}
    assert rows[0]["full_steps"] == 50
    assert rows[0]["speedup_wall"] == 1.0
    assert {row["full_steps"] for row in rows[1:]} == {10}
    assert any(row["method"].startswith("diffusers TaylorSeer") for row in rows)
    # the training works: as good as least squares on the same features allows, and better than what needs none
    assert paper["LESA"]["psnr"] > paper["reuse"]["psnr"] + 3
    assert paper["LESA"]["psnr"] > paper["least squares"]["psnr"] - 1
    assert paper["LESA"]["psnr"] > max(paper[f"Taylor {order}"]["psnr"] for order in (1, 2)) - 0.5
    # and so does the calibration: the default is the best there is, and LESA comes close to it without a feature
    assert best[DEFAULT]["psnr"] == max(row["psnr"] for row in rows[1:])
    assert best[DEFAULT]["psnr"] > paper["LESA"]["psnr"] + 12
    assert best["LESA, fit_gram"]["psnr"] > best["least squares"]["psnr"] - 1
    assert best["LESA, fit_gram"]["psnr"] > best["LESA, paper's training"]["psnr"] + 2
    assert all(row["classifier_agreement"] > 0.9 for row in rows)
    assert all(row["environment"]["versions"]["torch"] for row in rows)
    for picture in ("comparison.png", "plan.png"):
        assert mpimg.imread(tmp_path / picture).std() > 0.05
    assert "40 held-out digits" in " ".join(capsys.readouterr().out.split())
