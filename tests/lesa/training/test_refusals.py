"""Arguments and checkpoints that training refuses, and errors while it runs."""

import errno

import pytest
import torch

import lesa
from lesa import GramMatrix, LesaConfig, LesaWarning, StepPlan, Trajectories
from lesa.training.checkpoint import TrainingState
from tests.lesa.calibrations import calibration, random_gram
from tests.lesa.strategies import schedule

STEPS = 6
PLAN = StepPlan(STEPS, [0, 1, 3])
CONFIG = LesaConfig(STEPS, hidden_dim=2)
STREAMS = [("transformer", "cond"), ("transformer", "uncond")]
QUICK = {"epochs": (1, 1), "progress": False}


def trajectories(seed=0, times=None):
    """Random features of two streams that change linearly with the step."""
    generator = torch.Generator().manual_seed(seed)
    times = schedule(STEPS) if times is None else times
    path = torch.linspace(0, 1, STEPS).view(1, STEPS, 1, 1)
    made = {
        s: torch.randn(3, 1, 4, 2, generator=generator) + path * torch.randn(3, 1, 4, 2, generator=generator)
        for s in STREAMS
    }
    return Trajectories(times, [made])


def weights(predictor):
    """All parameters as one vector."""
    return torch.cat([p.flatten() for p in predictor.parameters()])


@pytest.mark.parametrize("other", ["stream", "features", "times"])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, other):
    path = tmp_path / "training.safetensors"
    lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], checkpoint=path, **QUICK)
    made, stream = trajectories(), STREAMS[0]
    if other == "stream":
        stream = STREAMS[1]
    elif other == "features":
        made = trajectories(seed=1)
    else:
        made = trajectories(times=schedule(STEPS) ** 2)
    with pytest.raises(ValueError, match=f"training with other arguments .*{other}"):
        lesa.fit(made, PLAN, CONFIG, stream=stream, checkpoint=path, **QUICK)


def test_a_finished_training_is_loaded_from_its_checkpoint(tmp_path):
    path = tmp_path / "training.safetensors"
    made = [lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], checkpoint=path, **QUICK) for _ in range(2)]
    assert torch.equal(*map(weights, made))


def test_a_training_that_diverges_raises_an_error(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(ValueError, match=r"diverged .*smaller learning_rate"):
        lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], learning_rate=1e30, checkpoint=path, **QUICK)


def test_a_finished_training_is_returned_even_if_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no room")

    expected = lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], **QUICK)
    save = TrainingState.save

    def last_only(self, path, arguments, *, only_if_due):
        return save(self, path, arguments, only_if_due=only_if_due) if only_if_due else full()

    monkeypatch.setattr(TrainingState, "save", last_only)
    with pytest.warns(LesaWarning, match="the training is done"):
        made = lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], checkpoint=tmp_path / "x", **QUICK)
    assert torch.equal(weights(made), weights(expected))


def test_training_does_not_change_the_random_state_of_the_caller():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], **QUICK)
    lesa.fit_gram(random_gram(STEPS), PLAN, schedule(STEPS), CONFIG, rounds=(1, 1), progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"epochs": (-1, 1)}, "epochs"),
        ({"epochs": (0, 0)}, "epochs"),
        ({"epochs": 3}, "epochs"),
        ({"epochs": (1.5, 1)}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_invalid_numbers_are_refused_by_the_name_of_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        lesa.fit(trajectories(), PLAN, CONFIG, stream=STREAMS[0], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lesa.fit("folder", PLAN), r"trajectories must be .*Trajectories.load\(folder\)"),
        (lambda: lesa.fit(calibration(), PLAN), "inner products are fitted by lesa.fit_gram"),
        (lambda: lesa.fit_gram(calibration(), PLAN, schedule(STEPS)), r"errors must be .*calibration\.errors"),
        (lambda: lesa.fit_gram(GramMatrix(STEPS), PLAN, schedule(STEPS), rounds=(-1, 1)), "rounds"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_with_what_to_give(call, message):
    with pytest.raises(ValueError, match=message):
        call()
