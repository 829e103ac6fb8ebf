"""Collected trajectories: files, checks, and batches."""

import pytest
import torch

from lesa import Trajectories
from lesa.training.trajectories import load_shard, save_shard, shard_path
from tests.lesa.strategies import schedule

COND, UNCOND = ("transformer", "cond"), ("transformer", "uncond")


def shard(samples=3, steps=5, streams=(COND, UNCOND)):
    """Random features of one file."""
    return {stream: torch.randn(samples, steps, 2, 4) for stream in streams}


def test_saved_trajectories_are_loaded_unchanged(tmp_path):
    shards = [shard(), shard(samples=2)]
    for i, features in enumerate(shards):
        save_shard(shard_path(tmp_path, i), schedule(5), features)
    loaded = Trajectories.load(tmp_path)
    assert loaded.samples == 5
    assert loaded.streams == [COND, UNCOND]
    torch.testing.assert_close(loaded.times, schedule(5))
    for ours, theirs in zip(shards, loaded.shards, strict=True):
        assert all(torch.equal(ours[stream], theirs[stream]) for stream in ours)


def test_a_truncated_file_is_refused_and_named(tmp_path):
    path = shard_path(tmp_path, 0)
    save_shard(path, schedule(5), shard())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"trajectories-00000.safetensors is not a complete trajectory file"):
        Trajectories.load(tmp_path)


def test_an_empty_folder_and_mixed_schedules_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trajectories"):
        Trajectories.load(tmp_path)
    save_shard(shard_path(tmp_path, 0), schedule(5), shard())
    save_shard(shard_path(tmp_path, 1), schedule(5, shift=0.3), shard())
    with pytest.raises(ValueError, match="another schedule"):
        Trajectories.load(tmp_path)


def test_a_file_of_another_request_is_refused(tmp_path):
    path = shard_path(tmp_path, 0)
    save_shard(path, schedule(5), shard(), request="a cat")
    load_shard(path, "a cat")
    with pytest.raises(ValueError, match="other prompts"):
        load_shard(path, "a dog")


def test_batches_have_every_sample_once_in_an_order_set_by_the_seed():
    trajectories = Trajectories(schedule(5), [shard(samples=5), shard(samples=3)])
    first = [b.clone() for b in trajectories.batches(2, stream=COND, seed=1)]
    again = list(trajectories.batches(2, stream=COND, seed=1))
    other = list(trajectories.batches(2, stream=COND, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))
    everything = torch.cat([s[COND] for s in trajectories.shards])

    def ordered(x):
        return x.flatten(1)[x.flatten(1)[:, 0].argsort()]

    assert torch.equal(ordered(torch.cat(first)), ordered(everything))
    assert torch.equal(torch.cat(list(trajectories.batches(2, stream=COND))), everything)


def test_shards_of_different_streams_or_steps_are_refused():
    with pytest.raises(ValueError, match="nothing"):
        Trajectories(schedule(5), [])
    with pytest.raises(ValueError, match="recorded"):
        Trajectories(schedule(5), [shard(), shard(streams=(COND,))])
    with pytest.raises(ValueError, match="5 steps"):
        Trajectories(schedule(5), [shard(), shard(steps=6)])
