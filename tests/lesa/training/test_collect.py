"""Collecting features: streams, files, resumed collections, and the disk space that is needed."""

from types import SimpleNamespace

import pytest
import torch

import lesa
import lesa.training.collect as collecting
from lesa.training.footprint import readable, trajectory_bytes
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.tiny import STEPS, arguments

COND = ("transformer", "cond")


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


def calls(count=2, **options):
    """The arguments of several calls with different seeds."""
    return [arguments(seed=i, **options) for i in range(count)]


def test_features_of_every_step_sample_and_branch_are_collected(pipeline):
    made = lesa.collect(pipeline, calls(guidance=3.0))
    assert made.streams == [("transformer", "cond"), ("transformer", "uncond")]
    assert made.samples == 4
    assert made.num_steps == STEPS
    assert all(f.shape == (2, STEPS, 16, 32) for shard in made.shards for f in shard.values())
    torch.testing.assert_close(made.times.float(), pipeline.scheduler.sigmas)


def test_collecting_does_not_change_the_pipeline(pipeline):
    before = tiny.generate(pipeline)
    lesa.collect(pipeline, calls())
    assert torch.equal(tiny.generate(pipeline), before)


def test_an_interrupted_collection_resumes_after_its_last_file(pipeline, tmp_path, monkeypatch):
    whole = lesa.collect(pipeline, calls(3))
    run, made = type(pipeline).__call__, []

    def interrupted(self, **options):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return run(self, **options)

    monkeypatch.setattr(type(pipeline), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lesa.collect(pipeline, calls(3), out=tmp_path)
    made.clear()
    resumed = lesa.collect(pipeline, calls(3), out=tmp_path)
    assert len(made) == 1  # two files exist already
    for ours, theirs in zip(whole.shards, resumed.shards, strict=True):
        assert torch.equal(ours[COND], theirs[COND])
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}


def test_files_of_another_request_are_refused(pipeline, tmp_path):
    lesa.collect(pipeline, calls(1), out=tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        lesa.collect(pipeline, [arguments(seed=7)], out=tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        lesa.collect(pipeline, calls(1), out=tmp_path, max_sequence_length=8)


def test_calls_without_a_generator_get_a_seed(pipeline):
    def without_generator(i):
        return {k: v for k, v in arguments(seed=i).items() if k != "generator"}

    a, b, c = (lesa.collect(pipeline, [without_generator(0)], seed=s).shards[0][COND] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_generation_that_ends_early_raises_an_error(pipeline):
    def stop(pipe, step, time, state):
        pipe._interrupt = step >= 3
        return {}

    with pytest.raises(ValueError, match="whole generations"):
        lesa.collect(pipeline, calls(1), callback_on_step_end=stop)
    with pytest.raises(ValueError, match="no prompts"):
        lesa.collect(pipeline, [])


def test_the_chosen_tokens_are_the_same_at_all_steps_of_a_call(pipeline):
    whole = lesa.collect(pipeline, calls(guidance=3.0))
    part = lesa.collect(pipeline, calls(guidance=3.0), tokens=5)
    subsets = []
    for all_tokens, some in zip(whole.shards, part.shards, strict=True):
        for stream in whole.streams:
            features, kept = all_tokens[stream], some[stream]
            assert kept.shape == (2, STEPS, 5, 32)
            found = [(features[0, 0] == token).all(-1).nonzero().item() for token in kept[0, 0]]
            assert torch.equal(features[:, :, found], kept)
            subsets.append(found)
    assert subsets[0] == subsets[1]  # the two branches of a call
    assert subsets[0] != subsets[2]  # two calls
    more = lesa.collect(pipeline, calls(1, guidance=3.0), tokens=99)  # more tokens than there are
    assert torch.equal(more.shards[0][COND], whole.shards[0][COND])


def test_the_announced_size_is_the_size_of_the_files(pipeline, tmp_path, capsys):
    for tokens, dtype in ((None, None), (5, torch.bfloat16)):
        out = tmp_path / str(tokens)
        made = lesa.collect(pipeline, calls(3, guidance=3.0), out=out, tokens=tokens, dtype=dtype)
        assert made.shards[0][COND].dtype == (dtype or torch.float32)
        expected = trajectory_bytes(6, STEPS, tokens or 16, 32, streams=2, dtype=dtype or torch.float32)
        assert sum(f.nbytes for shard in made.shards for f in shard.values()) == expected
        on_disk = sum(path.stat().st_size for path in out.iterdir())
        assert expected <= on_disk <= expected + 3 * 2048  # a header for each file
        assert f"3 calls with features [2, {STEPS}, {tokens or 16}, 32]" in capsys.readouterr().out


def test_the_released_recipe_needs_126_gigabytes_for_flux():
    assert readable(trajectory_bytes(100, 50, 4096, 3072)) == "126 GB"
    assert [readable(size) for size in (12, 2_500_000, 3 * 10**12)] == ["0.012 kB", "2.5 MB", "3 TB"]


def test_a_full_disk_is_reported_before_anything_is_written(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="tokens= keeps less"):
        lesa.collect(pipeline, calls(2), out=tmp_path)
    assert not list(tmp_path.iterdir())
