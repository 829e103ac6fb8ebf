"""The demo: its digits, its small trained model, and the report that it writes."""

import json

import pytest
import torch
from matplotlib import image as mpimg

from benchmarks.demo.training import flow_matching_loss, pack
from lesa.demo.digits import NUM_CLASSES, agreement, load_digits
from lesa.demo.model import embed, load_pipeline, sample, unpack
from lesa.demo.run import COUNTS, PAPER, run_demo


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_the_classifier_recognises_the_digits_of_the_data_set():
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


def test_guidance_uses_a_null_class(pipeline):
    labels = torch.arange(20) % NUM_CLASSES
    guided = sample(pipeline, labels.tolist(), range(20), num_steps=10, guidance=2.0)
    assert agreement(guided, labels) >= 0.9
    assert embed(torch.tensor([-1, 3])).tolist() == [[0.0] * 16, [0.0, 0, 0, 1] + [0.0] * 12]


def test_a_seed_gives_the_same_digit_in_any_batch_size(pipeline):
    together = sample(pipeline, [1, 2, 3], [5, 6, 7], num_steps=5)
    torch.testing.assert_close(sample(pipeline, [2], [6], num_steps=5), together[1:2])


def test_sampling_follows_the_time_shift_of_flux(pipeline):
    sample(pipeline, [0], [0], num_steps=10)
    factor = torch.tensor(1.15).exp()
    t = torch.linspace(1, 0.1, 10)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1], factor * t / (1 + (factor - 1) * t))


def test_unpacking_inverts_packing():
    images = torch.randn(3, 1, 8, 8)
    assert pack(images).shape == (3, 16, 4)
    assert torch.equal(unpack(pack(images)), images)


def test_the_shipped_model_has_the_training_loss_of_a_trained_model(pipeline):
    images, labels = load_digits()
    with torch.no_grad():
        assert flow_matching_loss(pipeline.transformer, images[:256], labels[:256]) < 0.4


def test_the_demo_writes_its_report_and_pictures(tmp_path, capsys):
    run_demo(tmp_path, held_out=40, timing_rounds=0)
    rows = json.loads((tmp_path / "report.json").read_text())
    found = {(row["method"], row["plan"]): row for row in rows}
    assert rows[0]["full_steps"] == 50
    assert rows[0]["speedup_wall"] == 1.0
    count = len(PAPER.full_steps)
    psnr = {name: found[name, "paper N=7"]["psnr"] for name in ("reuse", "Taylor 2", "LESA")}
    assert {found[name, "paper N=7"]["full_steps"] for name in psnr} == {count}
    # training beats reuse, and calibration beats the plain sampler with as many evaluations
    assert psnr["LESA"] > psnr["reuse"] + 3
    assert psnr["LESA"] > psnr["Taylor 2"] - 0.5
    for steps in COUNTS:
        calibrated, plain = (
            found[name]
            for name in (("path least squares", f"calibrated, {steps} steps"), ("plain sampler", f"{steps} steps"))
        )
        assert calibrated["full_steps"] == plain["full_steps"] == steps
        assert calibrated["speedup_ideal"] == plain["speedup_ideal"] == 50 / steps
        assert calibrated["psnr"] > plain["psnr"] + 10
    assert found["path least squares", f"calibrated, {count} steps"]["psnr"] > psnr["LESA"] + 12
    assert all(row["classifier_agreement"] > 0.8 for row in rows)
    assert all(row["environment"]["versions"]["torch"] for row in rows)
    for picture in ("comparison.png", "plan.png"):
        assert mpimg.imread(tmp_path / picture).std() > 0.05
    assert "40 held-out digits" in " ".join(capsys.readouterr().out.split())
