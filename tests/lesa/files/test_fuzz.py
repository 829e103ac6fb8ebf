"""Damaged files of every format: each is loaded and usable, or raises a ValueError or FileNotFoundError."""

import json
import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

import lesa
from lesa import GramMatrix, LesaConfig, LesaPredictor, StepPlan
from lesa.training.checkpoint import TrainingState
from lesa.training.trajectories import load_shard, save_shard
from tests.lesa.calibrations import calibration, random_gram
from tests.lesa.strategies import apply_changes, byte_changes

STEPS = 6
PLAN = StepPlan(STEPS, [0, 1, 3])
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
MAX_ALLOCATION = 1 << 26  # bytes that one allocation may have while a file of a few kilobytes is read


def calibration_file(folder):
    made = calibration(STEPS)
    made.streams["transformer", "cond"].output_errors = lesa.OutputErrorGram.from_gram(random_gram(STEPS))
    made.plan(2)
    made.save(folder)
    return folder / "calibration.safetensors"


def use_calibration(path):
    made = lesa.load(path.parent)
    plan = made.plan(2, times=made.times)
    for forecaster in made.forecasters().values():
        forecaster.table(plan, made.times)
    assert len(repr(made)) < 10_000


def gram_file(folder):
    random_gram(STEPS).save(folder / "gram.safetensors")
    return folder / "gram.safetensors"


def use_gram(path):
    gram = GramMatrix.load(path)
    lesa.LeastSquares(gram).table(StepPlan(gram.num_steps, [0]), torch.linspace(1, 0, gram.num_steps + 1))


def predictor_file(folder):
    made = LesaPredictor(LesaConfig(STEPS, hidden_dim=2))
    made.plan, made.schedule, made.losses = PLAN, TIMES, {"guided": [0.5]}
    made.save_pretrained(folder)
    return folder / "model.safetensors"


def use_predictor(path):
    made = lesa.load(path.parent)
    steps = made.config.num_steps or STEPS
    plan = StepPlan(steps, [0])
    times = torch.linspace(1, 0, steps + 1) if made.schedule is None else made.schedule
    made.table(made.plan or plan, times)


def config_file(folder):
    predictor_file(folder)
    return folder / "config.json"


def predictor_without_config(folder):
    """The weights alone, as after a save that was interrupted before config.json."""
    path = predictor_file(folder)
    (folder / "config.json").unlink()
    return path


def stream_file(folder):
    made = LesaPredictor(LesaConfig(STEPS, hidden_dim=2))
    lesa.save({("transformer", "cond"): made, ("transformer", "uncond"): made}, folder)
    return folder / "transformer.cond" / "config.json"


def use_stream(path):
    assert len(lesa.load(path.parents[1])) >= 1


def training_state():
    """The state of a training that has not started."""
    predictor = LesaPredictor(LesaConfig(STEPS, hidden_dim=2))
    optimizer = torch.optim.AdamW(predictor.parameters())
    return TrainingState(predictor, optimizer, {"guided": [], "closed loop": []})


def checkpoint_file(folder):
    state = training_state()
    for parameter in state.predictor.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.batches, state.losses = 1, {"guided": [0.5], "closed loop": []}
    state.save(folder / "training.safetensors", {"seed": 1}, only_if_due=False)
    return folder / "training.safetensors"


def use_checkpoint(path):
    state = training_state()
    state.restore(path, {"seed": 1})
    for parameter in state.predictor.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()


def shard_file(folder):
    path = folder / "trajectories-00000.safetensors"
    part = ("transformer", "uncond")  # takes part in some steps only
    shard = {("transformer", "cond"): torch.randn(2, STEPS, 3, 2), part: torch.randn(2, 2, 3, 2)}
    save_shard(path, TIMES, shard, {"tokens": None}, {part: 1})
    return path


def use_shard(path):
    times, shard, firsts = load_shard(path)
    for features in shard.values():
        features.float().sum()
    made = lesa.Trajectories(times, [shard], firsts)
    for stream in made.streams:
        made.of(stream).digest(stream)
        assert sum(map(len, made.batches(2, stream=stream))) == made.samples
    with pytest.raises(ValueError, match=path.name):
        load_shard(path, {"tokens": 5})


FORMATS = {
    "calibration": (calibration_file, use_calibration),
    "gram": (gram_file, use_gram),
    "predictor": (predictor_file, use_predictor),
    "unfinished predictor": (predictor_without_config, use_predictor),
    "config": (config_file, use_predictor),
    "stream": (stream_file, use_stream),
    "checkpoint": (checkpoint_file, use_checkpoint),
    "shard": (shard_file, use_shard),
}


@pytest.fixture(scope="module", params=FORMATS)
def file_format(request, tmp_path_factory):
    """The path of an intact file, its bytes, and a function that uses it."""
    make, use = FORMATS[request.param]
    path = make(tmp_path_factory.mktemp(request.param))
    use(path)
    return path, path.read_bytes(), use


@pytest.fixture(autouse=True)
def limit_allocations(monkeypatch):
    """Fail if a tensor is allocated whose size is only declared in the file."""
    for name in ("zeros", "empty", "ones", "full", "eye", "linspace", "arange", "rand", "randn", "tril_indices"):
        monkeypatch.setattr(torch, name, bounded(getattr(torch, name)))
    for name in ("new_zeros", "new_empty", "new_ones", "new_full", "expand", "repeat"):
        monkeypatch.setattr(torch.Tensor, name, bounded_method(getattr(torch.Tensor, name)))


def bounded(make):
    """A function that makes tensors, with a check of their size before memory is allocated."""

    def checked(*args, **kwargs):
        tensor = make(*args, **kwargs | {"device": "meta"})
        assert tensor.nbytes < MAX_ALLOCATION, f"an allocation of {tensor.nbytes} bytes"
        return make(*args, **kwargs)

    return checked


def bounded_method(make):
    """The same for a method of tensors."""

    def checked(tensor, *args, **kwargs):
        like = torch.Tensor.to(tensor, "meta")
        made = make(like, *args, **{k: v for k, v in kwargs.items() if k != "device"})
        assert made.nbytes < MAX_ALLOCATION, f"an allocation of {made.nbytes} bytes"
        return make(tensor, *args, **kwargs)

    return checked


def assert_loads_or_raises(path, data, use):
    """Write the bytes and use the file; any exception but the two that users may see fails the test."""
    path.write_bytes(data)
    try:
        use(path)
    except (ValueError, FileNotFoundError):
        return


def header_of(data):
    """The header of a safetensors file as JSON, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    """A safetensors file with another header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def with_examples(count):
    """Settings of hypothesis for a number of examples."""
    return settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=count)


# the number of examples: few in every run, many in the full test suite
examples_per_test = pytest.mark.parametrize("examples_per_test", [25, pytest.param(1000, marks=pytest.mark.full)])
values = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2**70, 1e308, 10**400, 0.5, "", "x", "transformer", [], {}, "1" * 400, [[0]], [1, 0]]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "streams"]), inner, max_size=2),
    max_leaves=5,
)


@examples_per_test
def test_changed_bytes_are_read_or_refused(file_format, examples_per_test):
    path, whole, use = file_format

    @with_examples(examples_per_test)
    @given(steps=byte_changes)
    def check(steps):
        assert_loads_or_raises(path, apply_changes(whole, steps), use)

    check()


@pytest.mark.parametrize("length", [0, 1, 7, "-1", "+1", "+64", 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_read_or_refused(file_format, length):
    path, whole, use = file_format
    if path.suffix == ".json":
        pytest.skip("has no header")
    (true,) = struct.unpack("<Q", whole[:8])
    assert_loads_or_raises(
        path, struct.pack("<Q", true + int(length) if isinstance(length, str) else length) + whole[8:], use
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "[]", "3", '"x"', "{}", "{", "NaN", ""])
def test_another_description_is_read_or_refused(file_format, text):
    """Instead of a whole JSON file, and instead of each string in a header."""
    path, whole, use = file_format
    if path.suffix == ".json":
        assert_loads_or_raises(path, text.encode(), use)
        return
    header, rest = header_of(whole)
    for key, value in header["__metadata__"].items():
        header["__metadata__"][key] = text
        assert_loads_or_raises(path, with_header(header, rest), use)
        header["__metadata__"][key] = value


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**62], [2**63], [2**64], [-1], [], [1] * 100])
def test_wrong_declared_sizes_are_read_or_refused(file_format, shape):
    """The shape of one tensor is changed, with the old offsets and with offsets that fit the new shape."""
    path, whole, use = file_format
    if path.suffix == ".json":
        pytest.skip("has no tensors")
    header, rest = header_of(whole)
    name = sorted(header.keys() - {"__metadata__"})[-1]
    before = header[name]
    size = math.prod(shape)
    for offsets in (before["data_offsets"], [0, size * 8], [len(rest), len(rest) + size * 8]):
        header[name] = before | {"shape": shape, "data_offsets": offsets}
        assert_loads_or_raises(path, with_header(header, rest), use)


@examples_per_test
def test_changed_descriptions_are_read_or_refused(file_format, examples_per_test):
    """One value of the description or of the header is replaced, at any depth."""
    path, whole, use = file_format

    @with_examples(examples_per_test)
    @given(where=st.lists(st.integers(0, 30), min_size=1, max_size=4), value=values)
    @example(where=[0], value=[[[[]]]] * 3)
    def check(where, value):
        if path.suffix == ".json":
            assert_loads_or_raises(path, json.dumps(replace_value(json.loads(whole), where, value)).encode(), use)
            return
        header, rest = header_of(whole)
        if where[0] % 2:
            assert_loads_or_raises(path, with_header(replace_value(header, where, value), rest), use)
            return
        described = header["__metadata__"]
        keys = sorted(described)
        key = keys[where[0] // 2 % len(keys)]
        try:
            inside = json.loads(described[key])
        except ValueError:
            inside = described[key]
        header["__metadata__"] = described | {key: json.dumps(replace_value(inside, where[1:], value))}
        assert_loads_or_raises(path, with_header(header, rest), use)

    check()


def replace_value(tree, where, value):
    """A JSON tree with one value replaced, at a place given by indices into its levels."""
    if not where or not isinstance(tree, dict | list) or not tree:
        return value
    if isinstance(tree, dict):
        key = sorted(tree)[where[0] % len(tree)]
        return tree | {key: replace_value(tree[key], where[1:], value)}
    index = where[0] % len(tree)
    return [*tree[:index], replace_value(tree[index], where[1:], value), *tree[index + 1 :]]


@examples_per_test
def test_changed_tensors_are_read_or_refused(file_format, examples_per_test):
    """Another shape, dtype or value of a tensor, a renamed tensor or a missing one."""
    path, whole, use = file_format
    if path.suffix == ".json":
        pytest.skip("has no tensors")
    path.write_bytes(whole)
    tensors = load(whole)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()

    @with_examples(examples_per_test)
    @given(which=st.integers(0, 30), how=st.sampled_from(sorted(CHANGES)))
    def check(which, how):
        name = sorted(tensors)[which % len(tensors)]
        made = {key: value.clone() for key, value in tensors.items() if key != name}
        new = CHANGES[how](tensors[name])
        if new is not None:
            made[name if how != "rename" else f"{name}2"] = new.contiguous()
        assert_loads_or_raises(path, save(made, metadata), use)

    check()


CHANGES = {
    "drop": lambda t: None,
    "rename": lambda t: t.clone(),
    "flat": lambda t: t.flatten(),
    "shorter": lambda t: t[:-1].clone() if t.ndim else t.clone(),
    "scalar": lambda t: t.new_zeros(()),
    "empty": lambda t: t.new_empty(0),
    "zero": torch.zeros_like,
    "nan": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "negative": lambda t: -t,
    "large": lambda t: t * 1e30,
    "float16": lambda t: t.half(),
    "int8": lambda t: t.to(torch.int8),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "turned": lambda t: t.flip(-1) if t.ndim else t.clone(),
}
