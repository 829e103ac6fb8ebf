"""Small files that would need much memory or time, and random files: both cost in proportion to their size."""

import io
import re
import struct
import tracemalloc
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lesa
from lesa.api.official import read_official
from lesa.api.official.unpickling import MAX_BYTES, OPCODES


def text(value: str) -> bytes:
    """The pickle of a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    """An integer as the pickle instruction LONG1."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def put(index: int) -> bytes:
    """The instruction that stores a value in the memo."""
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    """The instruction that takes a value from the memo."""
    return b"j" + struct.pack("<I", index)


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def path_joined_with_itself() -> bytes:
    """A path that is joined with itself 22 times, and doubles each time."""
    join = b"cpathlib\nPosixPath\n" + put(0) + text("a" * 200) + put(1)
    for index in range(1, 23):
        join += get(0) + get(index) + get(index) + b"\x86R" + put(index + 1)
    return join


def dictionaries_of_one_list() -> bytes:
    """One list of 2,000 pairs, from which 10,000 dictionaries are made."""
    pairs = b"](" + b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(2000)) + b"e"
    return (
        b"ccollections\nOrderedDict\n" + put(0) + pairs + put(1) + b"](" + 10000 * (get(0) + get(1) + b"\x85R") + b"e"
    )


def colliding_keys() -> bytes:
    """8,000 multiples of 2^61 - 1, which all have the hash 0."""
    return b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(2, 8000)) + b"u"


def colliding_memo() -> bytes:
    """Memo numbers whose hashes collide in a dictionary."""
    return b"N" + b"".join(put(i << 17) for i in range(1 << 15))


def wide_shape() -> bytes:
    """A shape of 3,000 dimensions, all one number of 2,000 bits."""
    shape = b"(" + number(2**2000) + put(0) + 2999 * get(0) + b"t" + put(1)
    return REBUILD + b"(" + STORAGE + b"K\x00" + shape + get(1) + b"\x89Nt" + b"R"


def many_dimensions() -> bytes:
    """A shape of 20,001 dimensions."""
    shape = b"(" + number(2**62) + put(0) + 20000 * get(0) + b"t" + put(1)
    return REBUILD + b"(" + STORAGE + b"K\x00" + shape + get(1) + b"\x89Nt" + b"R"


def one_name_many_times() -> bytes:
    """A module name of 100 kB, which each of 9,000 class names repeats."""
    return text("m" * 100_000) + put(0) + b"](" + 9000 * (get(0) + get(0) + b"\x93") + b"e"


def long_keys() -> bytes:
    """Two equal keys of 50 kB, which are compared at each item."""
    keys = b"".join(text("k" * 50_000) + put(i) for i in range(2))
    return keys + b"}(" + 7000 * (get(0) + b"N" + get(1) + b"N") + b"u"


def many_arguments() -> bytes:
    """A tuple of 20,000 values, which is the argument of 15,000 calls."""
    parts = b"(" + 20000 * b"h\x01" + b"t"
    return b"cpathlib\nPosixPath\nq\x00" + text("a") + b"q\x01" + parts + b"q\x02](" + 15000 * b"h\x00h\x02R" + b"e"


PICKLES = {
    "a path joined with itself": (path_joined_with_itself, "more than it has bytes for"),
    "many dictionaries of one list": (dictionaries_of_one_list, "more than it has bytes for"),
    "keys that collide": (colliding_keys, "a key that is not below|more than 64 bits"),
    "memo numbers that collide": (colliding_memo, "not the next"),
    "a shape of huge numbers": (wide_shape, "more than 64 bits"),
    "a shape of many dimensions": (many_dimensions, "20001 dimensions"),
    "a long name, repeated": (one_name_many_times, "longer than 256 characters"),
    "long keys, compared repeatedly": (long_keys, "longer than 256 characters"),
    "arguments, copied repeatedly": (many_arguments, "with 20000 values"),
    "a number in text of 200,000 digits": (lambda: b"I" + b"9" * 200_000 + b"\n", "instruction INT"),
    "a number of 200,000 bytes": (
        lambda: b"\x8b" + struct.pack("<i", 200_000) + bytes(200_000),
        "instruction LONG4",
    ),
    "text with escapes": (lambda: b"S'\\d'\n", "instruction STRING"),
    "a name with escapes": (lambda: b"cos\n\\d\n", "asks for os"),
    "a name without an end": (lambda: b"cos", "a name has no end"),
    "marks without end": (lambda: b"(" * 50_000, "finds no value"),
    "lists without end": (lambda: b"]" * 50_000 + b"a" * 49_999, "holds a list"),
    "a tuple of nothing": (lambda: b"\x86", "finds no value"),
}


def archive(path, data, entries=()):
    """A zip archive in the layout of torch.save, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries:
            file.writestr(name, content)
    return path


def refusal(path, most):
    """The message with which a file is refused; it is short, and reading needs at most ``most`` bytes of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="was not opened") as refused:
            read_official(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(refused.value)
    assert message.startswith(f"{path} was not opened: ")
    assert len(message) <= len(str(path)) + 350
    assert peak < most
    return message


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.filterwarnings("error")
def test_reading_a_pickle_costs_memory_in_proportion_to_its_size(tmp_path, name):
    make, why = PICKLES[name]
    data = b"\x80\x02" + make() + b"."
    assert len(data) <= MAX_BYTES
    path = archive(tmp_path / "bomb.pt", data)
    # an empty list takes 64 bytes of memory and 1 byte in a pickle
    message = refusal(path, 100 * len(data) + (1 << 20))
    assert re.search(why, message), message


# Archives written by hand, since zipfile does not write such files.


def local_header(name: str, content: bytes) -> bytes:
    """The header before the content of an entry."""
    crc, size = zlib.crc32(content), len(content)
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name.encode()


def directory_entry(name: str, content: bytes, offset: int, extra: bytes = b"") -> bytes:
    """The entry in the directory of an archive."""
    crc, size = zlib.crc32(content), len(content)
    sizes = (crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes) + name.encode() + extra


def complete_archive(content: bytes, directory: list[bytes]) -> bytes:
    """A complete archive: the entries, the directory and its end record."""
    listed = b"".join(directory)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(directory), len(directory), len(listed), len(content), 0)
    return content + listed + end


def tensor(shape, stride=None, *, offset=0, kind="FloatStorage", key="0", numel=4) -> bytes:
    """The pickle of a tensor."""
    sizes = [b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (shape, stride or [1] * len(shape))]
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    return REBUILD + b"(" + storage + number(offset) + sizes[0] + sizes[1] + b"\x89NtR"


def state(tensors: dict[str, bytes]) -> bytes:
    """The pickle of a dictionary of tensors."""
    items = b"".join(text(name) + made for name, made in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def test_archive_entries_that_share_bytes_are_refused(tmp_path):
    """The content of each entry starts with the header of the next one, and all end at the same byte."""
    names = [f"archive/data/{i}" for i in range(40)]
    content, nested = bytes(1 << 16), []
    for name in reversed(names):
        nested.insert(0, (name, content))
        content = local_header(name, content) + content
    pickle = state(
        {f"latent.{i}.weight": tensor([1, 4], key=str(i), numel=len(c) // 4) for i, (_, c) in enumerate(nested)}
    )
    listed = [directory_entry(name, c, len(content) - len(c) - 30 - len(name)) for name, c in nested]
    listed.append(directory_entry("archive/data.pkl", pickle, len(content)))
    path = tmp_path / "overlap.pt"
    path.write_bytes(complete_archive(content + local_header("archive/data.pkl", pickle) + pickle, listed))
    with zipfile.ZipFile(path) as file:
        assert sum(info.file_size for info in file.infolist()) > 30 * path.stat().st_size
    assert "overlaps with another entry" in refusal(path, 4 * path.stat().st_size)


def test_archive_entries_beyond_the_end_of_the_file_are_refused(tmp_path):
    pickle = state({})
    listed = [directory_entry("archive/data.pkl", pickle, 0), directory_entry("archive/data/0", pickle, 1 << 30)]
    (tmp_path / "far.pt").write_bytes(complete_archive(local_header("archive/data.pkl", pickle) + pickle, listed))
    assert "larger than the file" in refusal(tmp_path / "far.pt", 1 << 20)


@pytest.mark.parametrize("extra", [bytes(60_000), b""])
def test_an_archive_with_too_many_entries_is_refused(tmp_path, extra):
    """The time that zipfile needs for an extra field grows with the square of its length."""
    count = 400_000 // (len(extra) + 60)
    listed = [directory_entry(f"archive/data/{i:06}", b"", 0, extra) for i in range(count)]
    (tmp_path / "list.pt").write_bytes(complete_archive(b"", listed))
    assert "its list of entries has" in refusal(tmp_path / "list.pt", 1 << 20)


def test_a_very_long_entry_name_is_refused(tmp_path):
    archive(tmp_path / "name.pt", b"N.", [("archive/data/" + "0" * 60_000, b"")])
    assert "longer than 1000 characters" in refusal(tmp_path / "name.pt", 1 << 20)


def test_a_storage_shared_by_many_tensors_is_read_once(tmp_path, monkeypatch):
    pickle = state({f"latent.{i}.weight": tensor([1, 4], offset=i % 5, numel=1 << 16) for i in range(200)})
    path = archive(tmp_path / "shared.pt", pickle, [("archive/data/0", bytes(4 << 16))])
    reads, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: reads.append(name) or read(self, name))
    assert len(read_official(path).weights[""]) == 200
    assert reads == ["archive/data.pkl", "archive/data/0"]


# Weights whose shapes or values are invalid.

CONFIG = lesa.LesaConfig(num_steps=3, hidden_dim=2, history=2)


def small_weights() -> dict[str, torch.Tensor]:
    """The weights of a small random predictor."""
    torch.manual_seed(0)
    return {name: value.bfloat16() for name, value in lesa.LesaPredictor(CONFIG).state_dict().items()}


def saved(weights) -> bytes:
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    config = {"a": [1, 2.5, None, (True, "b")], "device": torch.device("cuda:0")}
    torch.save({"config": config, "model": weights, "optimizer": {"state": {0: torch.ones(1)}}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "shape",
    [(0, 1 << 62), (0, 1 << 62, 1 << 62), (1 << 40, 0, 1 << 40), (0, (1 << 63) - 1), (0, 1 << 64), (1 << 64,)],
)
@pytest.mark.parametrize("numel", [0, 4])
def test_an_empty_tensor_with_huge_dimensions_is_refused(tmp_path, shape, numel):
    pickle = state({"latent.0.weight": tensor(shape, numel=numel)})
    path = archive(tmp_path / "empty.pt", pickle, [("archive/data/0", bytes(4 * numel))])
    assert re.search("describes an empty tensor|more than 64 bits", refusal(path, 1 << 20))


def test_a_dimension_of_size_one_may_have_any_stride(tmp_path):
    pickle = state({"latent.0.weight": tensor([1, 4, 1], [(1 << 63) - 1, 1, (1 << 63) - 1])})
    path = archive(tmp_path / "stride.pt", pickle, [("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))])
    assert read_official(path).weights[""]["latent.0.weight"].flatten().tolist() == [1, 2, 3, 4]


LAYER = "timestep.0.layers.0"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({f"{LAYER}.grid": torch.zeros(0, 12)}, r"has \[4, 12\]"),
        ({f"{LAYER}.grid": torch.zeros(12)}, r"has \[4, 12\]"),
        ({f"{LAYER}.grid": torch.tensor(1.0)}, "not those of a LESA predictor"),
        ({f"{LAYER}.grid": torch.full((4, 12), torch.inf)}, "NaN or infinity"),
        ({f"{LAYER}.grid": torch.arange(12.0).flip(0).repeat(4, 1)}, "do not rise"),
        ({f"{LAYER}.grid": torch.arange(12).repeat(4, 1)}, "int64"),
        ({f"{LAYER}.base_weight": torch.zeros(0, 4)}, "hidden_dim must be"),
        ({f"{LAYER}.base_weight": torch.zeros(2, 0)}, "num_steps must be"),
        ({"latent.1.weight": torch.zeros(1, 0)}, "history must be"),
        ({"latent.0.weight": torch.zeros(0, 9)}, "latent.0.weight is"),
        ({f"{LAYER}.spline_weight": torch.zeros(2, 4, 0)}, "0 bases do not go with 12 knots"),
        ({"latent.2." + "b" * 200: torch.zeros(1)}, "1 weights are none of a LESA predictor's"),
    ],
)
def test_invalid_weights_are_refused_before_a_predictor_is_made(tmp_path, monkeypatch, changed, why):
    path = tmp_path / "odd.pt"
    path.write_bytes(saved(small_weights() | changed))
    monkeypatch.setattr("lesa.api.official.checkpoint.LesaPredictor", None)
    with pytest.raises(ValueError, match=why) as refused:
        lesa.load_official(path)
    assert str(path) in str(refused.value)


def test_knots_near_the_limits_of_float32_are_kept(tmp_path):
    weights = {name: value.float() for name, value in small_weights().items()}
    weights[f"{LAYER}.grid"] = torch.linspace(-3.3e38, 3.3e38, 12, dtype=torch.float64).float().repeat(4, 1)
    path = tmp_path / "far.pt"
    path.write_bytes(saved(weights))
    assert torch.equal(lesa.load_official(path).timestep[0].layers[0].grid, weights[f"{LAYER}.grid"])


def test_weights_in_the_file_are_not_initialised_first(tmp_path, monkeypatch):
    """Initial splines are fitted to noise, which takes time cubic in the number of bases in the file."""
    path = tmp_path / "small.pt"
    path.write_bytes(saved(small_weights()))
    pinv = torch.linalg.pinv
    fitted = []
    monkeypatch.setattr(torch.linalg, "pinv", lambda a: fitted.append(a.device.type) or pinv(a))
    state_before = torch.get_rng_state()
    predictor = lesa.load_official(path)
    assert set(fitted) <= {"meta"}
    assert torch.equal(torch.get_rng_state(), state_before)
    assert {t.device.type for t in predictor.state_dict().values()} == {"cpu"}


# Random files.


def is_read(path) -> bool:
    """True if a file is read, and False if a ValueError refuses it with a short message that begins with its path."""
    try:
        loaded = lesa.load_official(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert len(message) <= len(str(path)) + 350
        return False
    predictors = loaded.values() if isinstance(loaded, dict) else [loaded]
    assert all(bool(t.isfinite().all()) for p in predictors for t in p.state_dict().values())
    return True


WHOLE = saved(small_weights())
with zipfile.ZipFile(io.BytesIO(WHOLE)) as _file:
    ENTRIES = {info.filename: _file.read(info) for info in _file.infolist()}
    LISTED = [(info.header_offset, len(info.filename)) for info in _file.infolist()]
PICKLE = ENTRIES["archive/data.pkl"]
DIRECTORY = WHOLE.index(b"PK\1\2")
FEW, MANY = 40, 1000  # examples


def rezipped(pickle: bytes) -> bytes:
    """A checkpoint with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (ENTRIES | {"archive/data.pkl": pickle}).items():
            file.writestr(name, content)
    return buffer.getvalue()


@st.composite
def damaged(draw, data: bytes, begin: int = 0) -> bytes:
    """The bytes with some changed, inserted, removed, repeated or cut off, from ``begin`` on."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(begin, max(begin, len(result) - 1)))
        match draw(st.sampled_from(["change", "insert", "remove", "repeat", "cut"])):
            case "change":
                result[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                result[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del result[place : place + draw(st.integers(1, 8))]
            case "repeat":
                part = result[place : place + draw(st.integers(1, 200))]
                result[place:place] = part
            case "cut":
                del result[max(begin, len(result) - draw(st.integers(1, 60))) :]
    return bytes(result)


@st.composite
def changed_headers(draw) -> bytes:
    """An archive with numbers in its headers or its directory replaced by 0, by limits or by large values."""
    result = bytearray(WHOLE)
    end = WHOLE.rindex(b"PK\5\6")
    starts = [(m.start(), 46) for m in re.finditer(b"PK\1\2", WHOLE)] + [(at, 30) for at, _ in LISTED] + [(end, 22)]
    for _ in range(draw(st.integers(1, 3))):
        start, size = draw(st.sampled_from(starts))
        width = draw(st.sampled_from([1, 2, 4]))
        at = start + draw(st.integers(0, (size - width) // 2)) * 2
        edges = st.sampled_from([0, 1, 8, 0x7F, 0xFF, 0x800, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
        result[at : at + width] = (draw(edges) & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(result)


PARTS = [
    *OPCODES,
    *(
        b"ctorch\nFloatStorage\n",
        REBUILD,
        b"ccollections\nOrderedDict\n",
        b"cpathlib\nPosixPath\n",
        b"ctorch\ndevice\n",
    ),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"csomebody\nConfig\n", b"cposix\nsystem\n", b"ctorch\nfloat32\n"),
    *(STORAGE, tensor([1, 4]), tensor([]), text("model"), text("config"), text("latent.0.weight"), text("_metadata")),
    *(text("\n" * 300), number(2**63 - 1), number(-(2**63)), number(2**64), b"K\x00", b"K\x04", b"M\xff\xff"),
    *(b"G\x7f\xf8" + bytes(6), b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"\x8c\x05posix", b"\x94", b"\x93"),
    *(b"\x86R", b")R", b"(tR", b"](N", b"}(", b"NNu", b")\x81", b"}b"),
]


@st.composite
def programs(draw) -> bytes:
    """A pickle of random instructions."""
    parts = draw(st.lists(st.one_of(st.sampled_from(PARTS), st.binary(max_size=4)), max_size=40))
    return rezipped(b"\x80\x02" + b"".join(parts) + b".")


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1])


@st.composite
def changed_tensor(draw) -> bytes:
    """A checkpoint in which shape, stride, dtype, offset or bytes of one weight are changed."""
    pickle = bytearray()
    weights = small_weights()
    changed = draw(st.sampled_from(list(weights)))
    kinds = ["BFloat16Storage", "FloatStorage", "DoubleStorage", "BoolStorage", "LongStorage", "HalfStorage"]
    items, storages = {}, {}
    for key, (name, value) in enumerate(weights.items()):
        shape, stride, kind, offset = list(value.shape), list(value.stride()), "BFloat16Storage", 0
        content = value.contiguous().view(torch.uint8).numpy().tobytes()
        numel = value.numel()
        if name == changed:
            shape = draw(st.one_of(st.just(shape), st.lists(SIZES, max_size=10)))
            stride = draw(st.one_of(st.just(stride), st.lists(SIZES, min_size=len(shape), max_size=len(shape))))
            kind, offset = draw(st.sampled_from(kinds)), draw(st.one_of(st.just(0), SIZES))
            numel = draw(st.one_of(st.just(numel), SIZES))
            content = draw(st.one_of(st.just(content), st.binary(max_size=32)))
        items[name] = tensor(shape, stride, offset=offset, kind=kind, key=str(key), numel=numel)
        storages[f"archive/data/{key}"] = content
    pickle = state(items)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in ({"archive/data.pkl": pickle} | storages).items():
            file.writestr(name, content)
    return buffer.getvalue()


FILES = {
    "bytes": damaged(WHOLE),
    "directory": damaged(WHOLE, DIRECTORY),
    "headers": changed_headers(),
    "description": damaged(PICKLE).map(rezipped),
    "programs": programs(),
    "tensors": changed_tensor(),
}


def check_files(kind, path, count):
    """Read many random files of one kind."""

    @settings(max_examples=count)
    @given(FILES[kind])
    def each(data):
        path.write_bytes(data)
        is_read(path)

    each()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("error")
def test_a_random_file_is_read_or_refused(tmp_path, kind):
    check_files(kind, tmp_path / "random.pt", FEW)


@pytest.mark.full
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("error")
def test_many_random_files_are_read_or_refused(tmp_path, kind):
    check_files(kind, tmp_path / "random.pt", MANY)


def test_the_undamaged_files_are_read(tmp_path):
    for number_, data in enumerate([WHOLE, rezipped(PICKLE)]):
        path = tmp_path / f"{number_}.pt"
        path.write_bytes(data)
        assert is_read(path)
