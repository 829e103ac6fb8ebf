"""Two processes under accelerate, with gloo: ``python -m tests.lesa.training.test_processes FOLDER`` is one of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lesa
from lesa import LesaPredictor, Trajectories
from lesa.training.trajectories import save_shard, shard_path
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.training.test_two_stage import CONFIG, PLAN, STREAM, smooth

ROOT = Path(__file__).parents[3]
# With batches of 3 the last of 16 samples is alone: one process has no sample, and the other must not wait for it.
SETTINGS = {"epochs": (1, 1), "batch": 3, "progress": False}


def calls():
    """The arguments of three calls with different seeds."""
    return [tiny.arguments(seed=i) for i in range(3)]


def work(folder: Path) -> None:
    """The work of each process: fit a predictor and collect features."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    trajectories, state = Trajectories.load(folder / "smooth"), folder / "state.safetensors"
    predictor = lesa.fit(trajectories, PLAN, CONFIG, accelerator=accelerator, checkpoint=state, **SETTINGS)
    predictor.save_pretrained(folder / f"predictor-{accelerator.process_index}")
    made = lesa.collect(tiny.pipeline(), calls(), out=folder / "tiny", accelerator=accelerator, progress=False)
    assert made.samples == 6
    accelerator.end_training()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the files that two processes wrote."""
    folder, trajectories = tmp_path_factory.mktemp("processes"), smooth()
    (folder / "smooth").mkdir()
    for i in range(2):
        features = trajectories.shards[0][STREAM][i::2]
        save_shard(shard_path(folder / "smooth", i), trajectories.times, {STREAM: features})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lesa.training.test_processes", str(folder)],
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return folder


def test_two_processes_train_the_same_predictor_as_one(folder):
    alone = lesa.fit(Trajectories.load(folder / "smooth"), PLAN, CONFIG, **SETTINGS)
    first, second = (LesaPredictor.from_pretrained(folder / f"predictor-{rank}") for rank in (0, 1))
    for key, value in alone.state_dict().items():
        assert torch.equal(first.state_dict()[key], second.state_dict()[key])
        torch.testing.assert_close(first.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    assert first.losses == {k: pytest.approx(v, rel=1e-5) for k, v in alone.losses.items()}
    assert (folder / "state.safetensors").exists()


def test_two_processes_share_the_calls_of_a_collection(folder):
    alone = lesa.collect(tiny.pipeline(), calls(), progress=False)
    for ours, theirs in zip(Trajectories.load(folder / "tiny").shards, alone.shards, strict=True):
        torch.testing.assert_close(ours[STREAM], theirs[STREAM])


def test_several_processes_need_a_folder_to_collect_into():
    class Two:
        process_index, num_processes = 0, 2

    with pytest.raises(ValueError, match="out="):
        lesa.collect(None, [{}], accelerator=Two())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
