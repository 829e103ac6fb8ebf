"""The benchmark of evaluations, and the training of the picture model that it can run on."""

import pytest
import torch

from benchmarks import evaluations
from benchmarks.evaluations import Subject, measure, timing
from benchmarks.pictures.model import BACKGROUNDS, NAMES, Pictures, images_of, is_held_out, load_pictures
from benchmarks.pictures.training import Model, draw, pack, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A picture model after two updates."""
    folder = tmp_path_factory.mktemp("pictures")
    loss = train(128, folder)
    assert 0.5 < loss < 3
    return folder


@pytest.mark.parametrize("name", ["digits", "pictures"])
def test_every_method_is_measured_against_the_exact_solution(name, trained, monkeypatch):
    for constant, value in {"EVALUATIONS": (3,), "EXACT": 12, "IMITATED": 8, "FINE": 12}.items():
        monkeypatch.setattr(evaluations, constant, value)
    monkeypatch.setattr(evaluations, "CALIBRATION", range(50_000, 50_002))
    subject, rows = Subject(trained if name == "pictures" else None), []
    measure(subject, range(2), 3.0 if name == "digits" else 1.0, rows.append)
    assert [row["evaluations"] for row in rows if row["method"] == "plain sampler"] == [8, 3]
    methods = {row["method"] for row in rows}
    assert methods == {
        *("plain sampler", "DPM-Solver++", "UniPC", "Heun"),
        *("50 steps, calibrated", "substeps", "substeps, calibrated"),
    }
    assert all(row["psnr_exact"] > 5 for row in rows)
    heun = next(row for row in rows if row["method"] == "Heun")
    assert heun["evaluations"] == 3
    assert all(row["kept_bytes"] > 0 for row in rows if "kept_bytes" in row)


def test_the_time_of_substeps_is_compared_with_plain_steps(monkeypatch):
    monkeypatch.setattr(evaluations, "FINE", 12)
    rows = timing(Subject(None), 1)
    assert {(row["batch"], row["method"]) for row in rows} == {
        (batch, method) for batch in (1, 64) for method in ("nothing calibrated", "calibrated")
    }
    assert all(row["ratio"] > 0 for row in rows)


def test_no_held_out_pair_is_drawn_in_training():
    names, backgrounds = torch.cartesian_prod(torch.arange(NAMES), torch.arange(BACKGROUNDS)).T
    held_out = is_held_out(names, backgrounds)
    assert float(held_out.double().mean()) == pytest.approx(0.1, abs=0.001)
    moved = torch.where(held_out, (backgrounds + 1) % BACKGROUNDS, backgrounds)
    assert not bool(is_held_out(names, moved).any())


def test_pictures_are_packed_as_the_pipeline_unpacks_them():
    pictures = draw(load_pictures()[:4], torch.arange(4), torch.Generator().manual_seed(0))
    assert pictures.shape == (4, 3, 32, 32)
    assert -1 <= float(pictures.min()) < float(pictures.max()) <= 1 + 1e-6
    output = type("Output", (), {"images": pack(pictures)})
    torch.testing.assert_close(images_of(output), pictures.add(1).div(2))


def test_an_untrained_picture_model_predicts_zero():
    velocity = Model()(torch.randn(1, 64, 48), torch.ones(1), torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(velocity, torch.zeros(1, 64, 48))


def test_requests_ask_for_held_out_pairs_from_their_own_seeds(trained):
    model = Pictures(trained)
    one, two = (model.request(seeds, num_steps=2) for seeds in ([5], [4, 5]))
    torch.testing.assert_close(one["prompt_embeds"][0], two["prompt_embeds"][1])
    single, pair = (images_of(model.pipeline(**call)) for call in (model.request([5], num_steps=2), two))
    torch.testing.assert_close(single[0], pair[1], rtol=1e-4, atol=1e-4)
    assert one["generator"][0].initial_seed() == 5
