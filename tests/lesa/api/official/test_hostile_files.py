"""Malicious and damaged checkpoints: they are refused before they cost much memory or time."""

import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lesa
from lesa.api.official import read_official
from lesa.api.official.unpickling import read_pickle
from tests.lesa.api.official.test_checkpoint import official_weights
from tests.lesa.strategies import apply_changes, byte_changes

PROTO, MARK, TUPLE, REDUCE, STOP, MEMO, APPENDS = b"\x80\x04", b"(", b"t", b"R", b".", b"\x94", b"e"
EMPTY_LIST, EMPTY_DICT, TUPLE1, TUPLE2, SETITEMS, STACK_GLOBAL = b"]", b"}", b"\x85", b"\x86", b"u", b"\x93"


def text(value):
    """The pickle of a string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module, called):
    """The pickle of a class or function."""
    return text(module) + text(called) + STACK_GLOBAL


def get(index):
    """The instruction that takes a value from the memo."""
    return b"h" + bytes([index])


def long_integer(value):
    """The pickle of an integer of any size."""
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def path_joined_with_itself():
    """p = PosixPath(p, p), repeated: 8 more bytes double its length."""
    start = PROTO + name("pathlib", "PosixPath") + MEMO + text("x" * 64) + MEMO
    again = b"".join(get(0) + get(1 + i) + get(1 + i) + TUPLE2 + REDUCE + MEMO for i in range(60))
    return start + again + STOP


def dictionaries_of_one_list():
    """3,000 calls of OrderedDict(pairs) with one list of pairs."""
    pairs = b"".join(text(f"{i}") + text("v") + TUPLE2 for i in range(2000))
    start = PROTO + name("collections", "OrderedDict") + MEMO + EMPTY_LIST + MARK + pairs + APPENDS + MEMO
    return start + EMPTY_LIST + MARK + (get(0) + get(1) + TUPLE1 + REDUCE) * 3000 + APPENDS + STOP


def keys_that_collide():
    """Integers with the same hash: multiples of the modulus of Python's hashes."""
    pairs = b"".join(long_integer(i * ((1 << 61) - 1)) + b"N" for i in range(1, 5000))
    return PROTO + EMPTY_DICT + MARK + pairs + SETITEMS + STOP


def shape_of_long_numbers():
    """A shape of 3,000 dimensions, all one number of 2,000 bits."""
    number = long_integer(1 << 2000)
    return PROTO + number + MEMO + MARK + get(0) * 3000 + TUPLE + STOP


def shape_of_many_dimensions():
    """A tensor of 3,000 dimensions of size 1."""
    storage = MARK + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01" + TUPLE + b"Q"
    shape = MARK + b"K\x01" * 3000 + TUPLE + MEMO
    rebuild = name("torch._utils", "_rebuild_tensor_v2") + MARK + storage + b"K\x00" + shape + get(0)
    return PROTO + rebuild + b"\x89" + EMPTY_DICT + TUPLE + REDUCE + STOP


BOMBS = [
    path_joined_with_itself,
    dictionaries_of_one_list,
    keys_that_collide,
    shape_of_long_numbers,
    shape_of_many_dimensions,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_pickle_that_would_grow_in_memory_is_refused_early(bomb):
    data = bomb()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r".") as refused:
        read_pickle(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20 if len(data) < 1 << 14 else most < 64 * len(data)
    assert len(str(refused.value)) < 500


def archive(path, description, storages=()):
    """A zip archive in the layout of torch.save, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", description)
        for key, data in enumerate(storages):
            file.writestr(f"x/data/{key}", data)
    return path


def test_archive_entries_that_overlap_are_refused(tmp_path):
    """The directory of an archive may list the same bytes many times."""
    path = archive(tmp_path / "x.pt", PROTO + EMPTY_DICT + STOP, [b"\0" * 1000])
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    directory, end = whole[start:-22], whole[-22:]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    again = b"".join(entry.replace(b"data/0", b"data/%d" % i) for i in range(1, 10))
    counts = struct.pack("<HHI", 11, 11, len(directory + again))
    path.write_bytes(whole[:start] + directory + again + end[:8] + counts + end[16:])
    with pytest.raises(ValueError, match="overlaps with another entry"):
        read_official(path)


@pytest.mark.parametrize("shape", [(0, 2**64), (0, 2**62, 2**62), (2**62, 2**62), (0, 12), (1, 0)])
def test_impossible_weight_shapes_raise_a_value_error(tmp_path, shape):
    weights = official_weights()
    torch.save({"model": weights}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    old = pickle.dumps(tuple(weights["timestep.0.layers.0.grid"].shape), protocol=2)[2:-1].split(b"q")[0]
    new = pickle.dumps(shape, protocol=2)[2:-1].split(b"q")[0]
    path = tmp_path / "odd.pt"
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in entries.items():
            file.writestr(entry, data.replace(old, new))
    with pytest.raises(ValueError, match=r"odd\.pt"):
        lesa.load_official(path)


def undamaged_file(folder):
    """The bytes of an undamaged checkpoint."""
    path = folder / "whole.pt"
    if not path.exists():
        torch.save({"config": {"steps": 12}, "model": official_weights()}, path)
    return path.read_bytes()


def assert_loads_or_raises(path):
    """Load the file; any exception but the two that users may see fails the test."""
    try:
        loaded = lesa.load_official(path)
    except (ValueError, FileNotFoundError):
        return
    assert all(bool(p.isfinite().all()) for p in loaded.parameters())


allow_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@allow_tmp_path
@given(steps=byte_changes)
def test_changed_bytes_are_read_or_refused(tmp_path, steps):
    path = tmp_path / "x.pt"
    path.write_bytes(apply_changes(undamaged_file(tmp_path), steps))
    assert_loads_or_raises(path)


@allow_tmp_path
@given(steps=byte_changes, directory=st.booleans())
def test_changed_archive_directories_and_pickles_are_read_or_refused(tmp_path, steps, directory):
    """The parts where few bytes change most: the directory of the archive, and the pickle."""
    whole, path = undamaged_file(tmp_path), tmp_path / "x.pt"
    start = whole.index(b"PK\x01\x02") if directory else whole.index(b"\x80\x02")
    end = len(whole) if directory else start + 3000
    path.write_bytes(whole[:start] + apply_changes(whole[start:end], steps) + whole[end:])
    assert_loads_or_raises(path)


CODES = [MARK, TUPLE, REDUCE, MEMO, APPENDS, EMPTY_LIST, EMPTY_DICT, TUPLE1, TUPLE2, SETITEMS, STACK_GLOBAL]
CODES += [b"N", b"0", b"K\x05", b"Q", b"b", b"\x81", b"s", b"a", get(0), get(1), text("model"), text("config")]
CODES += [name("collections", "OrderedDict"), name("torch._utils", "_rebuild_tensor_v2"), name("pathlib", "PosixPath")]
CODES += [name("torch", "FloatStorage"), name("os", "system"), long_integer(1 << 70), long_integer(-1)]


@allow_tmp_path
@given(codes=st.lists(st.sampled_from(CODES), max_size=40))
def test_random_pickle_programs_are_read_or_refused(tmp_path, codes):
    assert_loads_or_raises(archive(tmp_path / "x.pt", PROTO + b"".join(codes) + STOP, [b"\0" * 20]))


@pytest.mark.full
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5000)
@given(steps=byte_changes)
def test_many_more_changed_bytes_are_read_or_refused(tmp_path, steps):
    path = tmp_path / "x.pt"
    path.write_bytes(apply_changes(undamaged_file(tmp_path), steps))
    assert_loads_or_raises(path)
