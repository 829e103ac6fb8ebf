import pytest
import torch

import lesa
from tests.lesa.adapters import tiny
from tests.lesa.adapters.tiny import STEPS, arguments


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


def calls(count=2, **options):
    return [arguments(seed=i, **options) for i in range(count)]


def test_features_of_every_step_sample_and_branch_are_kept(pipeline):
    made = lesa.collect(pipeline, calls(guidance=3.0))
    assert made.streams == [("transformer", "cond"), ("transformer", "uncond")]
    assert made.samples == 4
    assert made.num_steps == STEPS
    assert all(f.shape == (2, STEPS, 16, 32) for shard in made.shards for f in shard.values())
    torch.testing.assert_close(made.times.float(), pipeline.scheduler.sigmas)


def test_the_pipeline_is_left_as_it_was(pipeline):
    before = tiny.generate(pipeline)
    lesa.collect(pipeline, calls())
    assert torch.equal(tiny.generate(pipeline), before)


def test_an_interrupted_collection_goes_on_where_it_was(pipeline, tmp_path, monkeypatch):
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
    assert len(made) == 1  # two were there already
    for ours, theirs in zip(whole.shards, resumed.shards, strict=True):
        assert torch.equal(ours["transformer", "cond"], theirs["transformer", "cond"])
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}


def test_files_of_another_request_are_not_taken_for_this_one(pipeline, tmp_path):
    lesa.collect(pipeline, calls(1), out=tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        lesa.collect(pipeline, [arguments(seed=7)], out=tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        lesa.collect(pipeline, calls(1), out=tmp_path, max_sequence_length=8)


def test_seeds_are_given_to_calls_that_bring_none(pipeline):
    def without_generator(i):
        return {k: v for k, v in arguments(seed=i).items() if k != "generator"}

    a, b, c = (
        lesa.collect(pipeline, [without_generator(0)], seed=s).shards[0]["transformer", "cond"] for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_generation_that_ends_early_is_an_error(pipeline):
    def stop(pipe, step, time, state):
        pipe._interrupt = step >= 3
        return {}

    with pytest.raises(ValueError, match="whole generations"):
        lesa.collect(pipeline, calls(1), callback_on_step_end=stop)
    with pytest.raises(ValueError, match="no prompts"):
        lesa.collect(pipeline, [])
