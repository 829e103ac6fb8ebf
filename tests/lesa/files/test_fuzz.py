"""Every kind of file, changed in every way: it is loaded and works, or it is a ValueError or FileNotFoundError."""

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
from tests.lesa.calibrations import calibration, measured
from tests.lesa.strategies import changed, changes

STEPS = 6
PLAN = StepPlan(STEPS, [0, 1, 3])
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
ROOM = 1 << 26  # bytes that reading a file of a few kilobytes may ask for at once


def a_calibration(folder):
    made = calibration(STEPS)
    made.streams["transformer", "cond"].output_errors = lesa.OutputErrorGram.from_gram(measured(STEPS))
    made.plan(2)
    made.save(folder)
    return folder / "calibration.safetensors"


def use_calibration(path):
    made = lesa.load(path.parent)
    plan = made.plan(2, times=made.times)
    for forecaster in made.forecasters().values():
        forecaster.table(plan, made.times)
    assert len(repr(made)) < 10_000


def a_gram(folder):
    measured(STEPS).save(folder / "gram.safetensors")
    return folder / "gram.safetensors"


def use_gram(path):
    gram = GramMatrix.load(path)
    lesa.LeastSquares(gram).table(StepPlan(gram.num_steps, [0]), torch.linspace(1, 0, gram.num_steps + 1))


def a_predictor(folder):
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


def a_config(folder):
    a_predictor(folder)
    return folder / "config.json"


def an_unfinished_predictor(folder):
    """A saving was interrupted before config.json: only the header of the weights is there."""
    path = a_predictor(folder)
    (folder / "config.json").unlink()
    return path


def a_stream(folder):
    made = LesaPredictor(LesaConfig(STEPS, hidden_dim=2))
    lesa.save({("transformer", "cond"): made, ("transformer", "uncond"): made}, folder)
    return folder / "transformer.cond" / "config.json"


def use_stream(path):
    assert len(lesa.load(path.parents[1])) >= 1


def progress():
    predictor = LesaPredictor(LesaConfig(STEPS, hidden_dim=2))
    optimizer = torch.optim.AdamW(predictor.parameters())
    return TrainingState(predictor, optimizer, {"guided": [], "closed loop": []})


def a_checkpoint(folder):
    state = progress()
    for parameter in state.predictor.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.batches, state.losses = 1, {"guided": [0.5], "closed loop": []}
    state.save(folder / "training.safetensors", {"seed": 1}, only_if_due=False)
    return folder / "training.safetensors"


def use_checkpoint(path):
    state = progress()
    state.restore(path, {"seed": 1})
    for parameter in state.predictor.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()


def a_shard(folder):
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
    "calibration": (a_calibration, use_calibration),
    "gram": (a_gram, use_gram),
    "predictor": (a_predictor, use_predictor),
    "unfinished predictor": (an_unfinished_predictor, use_predictor),
    "config": (a_config, use_predictor),
    "stream": (a_stream, use_stream),
    "checkpoint": (a_checkpoint, use_checkpoint),
    "shard": (a_shard, use_shard),
}


@pytest.fixture(scope="module", params=FORMATS)
def kind(request, tmp_path_factory):
    """A whole file, and what uses it."""
    make, use = FORMATS[request.param]
    path = make(tmp_path_factory.mktemp(request.param))
    use(path)
    return path, path.read_bytes(), use


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """Nothing of a size that the file only declares is made room for."""
    for name in ("zeros", "empty", "ones", "full", "eye", "linspace", "arange", "rand", "randn", "tril_indices"):
        monkeypatch.setattr(torch, name, bounded(getattr(torch, name)))
    for name in ("new_zeros", "new_empty", "new_ones", "new_full", "expand", "repeat"):
        monkeypatch.setattr(torch.Tensor, name, bounded_method(getattr(torch.Tensor, name)))


def bounded(make):
    def checked(*args, **kwargs):
        tensor = make(*args, **kwargs | {"device": "meta"})
        assert tensor.nbytes < ROOM, f"room for {tensor.nbytes} bytes"
        return make(*args, **kwargs)

    return checked


def bounded_method(make):
    def checked(tensor, *args, **kwargs):
        like = torch.Tensor.to(tensor, "meta")
        made = make(like, *args, **{k: v for k, v in kwargs.items() if k != "device"})
        assert made.nbytes < ROOM, f"room for {made.nbytes} bytes"
        return make(tensor, *args, **kwargs)

    return checked


def is_read_or_refused(path, data, use):
    path.write_bytes(data)
    try:
        use(path)
    except (ValueError, FileNotFoundError):
        return


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def examples(count):
    return settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=count)


# how many: few in every run, many where there is time
effort = pytest.mark.parametrize("effort", [25, pytest.param(1000, marks=pytest.mark.full)])
values = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2**70, 1e308, 10**400, 0.5, "", "x", "transformer", [], {}, "1" * 400, [[0]], [1, 0]]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "streams"]), inner, max_size=2),
    max_leaves=5,
)


@effort
def test_changed_bytes(kind, effort):
    path, whole, use = kind

    @examples(effort)
    @given(steps=changes)
    def check(steps):
        is_read_or_refused(path, changed(whole, steps), use)

    check()


@pytest.mark.parametrize("length", [0, 1, 7, "-1", "+1", "+64", 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_of_another_length(kind, length):
    path, whole, use = kind
    if path.suffix == ".json":
        pytest.skip("has no header")
    (true,) = struct.unpack("<Q", whole[:8])
    is_read_or_refused(
        path, struct.pack("<Q", true + int(length) if isinstance(length, str) else length) + whole[8:], use
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "[]", "3", '"x"', "{}", "{", "NaN", ""])
def test_a_description_that_is_something_else(kind, text):
    """As the whole of a JSON file, and in the place of every string of a header."""
    path, whole, use = kind
    if path.suffix == ".json":
        is_read_or_refused(path, text.encode(), use)
        return
    header, rest = header_of(whole)
    for key, value in header["__metadata__"].items():
        header["__metadata__"][key] = text
        is_read_or_refused(path, with_header(header, rest), use)
        header["__metadata__"][key] = value


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**62], [2**63], [2**64], [-1], [], [1] * 100])
def test_declared_sizes(kind, shape):
    """Of one tensor, with offsets as they were and with those that such a shape would have."""
    path, whole, use = kind
    if path.suffix == ".json":
        pytest.skip("has no tensors")
    header, rest = header_of(whole)
    name = sorted(header.keys() - {"__metadata__"})[-1]
    before = header[name]
    size = math.prod(shape)
    for offsets in (before["data_offsets"], [0, size * 8], [len(rest), len(rest) + size * 8]):
        header[name] = before | {"shape": shape, "data_offsets": offsets}
        is_read_or_refused(path, with_header(header, rest), use)


@effort
def test_changed_descriptions(kind, effort):
    """Of one value of the description or of the header another one, deep inside or at the top."""
    path, whole, use = kind

    @examples(effort)
    @given(where=st.lists(st.integers(0, 30), min_size=1, max_size=4), value=values)
    @example(where=[0], value=[[[[]]]] * 3)
    def check(where, value):
        if path.suffix == ".json":
            is_read_or_refused(path, json.dumps(replaced(json.loads(whole), where, value)).encode(), use)
            return
        header, rest = header_of(whole)
        if where[0] % 2:
            is_read_or_refused(path, with_header(replaced(header, where, value), rest), use)
            return
        described = header["__metadata__"]
        keys = sorted(described)
        key = keys[where[0] // 2 % len(keys)]
        try:
            inside = json.loads(described[key])
        except ValueError:
            inside = described[key]
        header["__metadata__"] = described | {key: json.dumps(replaced(inside, where[1:], value))}
        is_read_or_refused(path, with_header(header, rest), use)

    check()


def replaced(tree, where, value):
    if not where or not isinstance(tree, dict | list) or not tree:
        return value
    if isinstance(tree, dict):
        key = sorted(tree)[where[0] % len(tree)]
        return tree | {key: replaced(tree[key], where[1:], value)}
    index = where[0] % len(tree)
    return [*tree[:index], replaced(tree[index], where[1:], value), *tree[index + 1 :]]


@effort
def test_changed_tensors(kind, effort):
    """Another shape, another dtype, other numbers, a name too many or one too few."""
    path, whole, use = kind
    if path.suffix == ".json":
        pytest.skip("has no tensors")
    path.write_bytes(whole)
    tensors = load(whole)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()

    @examples(effort)
    @given(which=st.integers(0, 30), how=st.sampled_from(sorted(CHANGES)))
    def check(which, how):
        name = sorted(tensors)[which % len(tensors)]
        made = {key: value.clone() for key, value in tensors.items() if key != name}
        new = CHANGES[how](tensors[name])
        if new is not None:
            made[name if how != "rename" else f"{name}2"] = new.contiguous()
        is_read_or_refused(path, save(made, metadata), use)

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
