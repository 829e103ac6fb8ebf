"""Checkpoints of the paper's authors: their weights and settings are read, and no code in them is run."""

import contextlib
import dataclasses
import io
import itertools
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lesa
from lesa.api.official import read_official
from lesa.api.official.archive import Archive
from lesa.cli.commands import main
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.strategies import schedule

STEPS, HIDDEN, HISTORY = 12, 16, 8


def official_weights(branch="", seed=0, prefix=""):
    """A random state_dict with the keys, shapes and dtype of the authors', as large as after training."""
    torch.manual_seed(seed)
    widths, weights = [STEPS + 1, HIDDEN, HIDDEN, 1], {}
    knots = torch.arange(-3, 9) * (6 / 5) - 3
    for stage in range(3):
        window = HISTORY // 2 if stage == 0 else HISTORY
        weights[f"latent{branch}.{stage}.weight"] = torch.randn(1, window) * 0.3
        weights[f"latent{branch}.{stage}.bias"] = torch.randn(1) * 0.1
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layer = f"timestep{branch}.{stage}.layers.{i}"
            weights[f"{layer}.base_weight"] = torch.randn(outputs, inputs) / inputs**0.5
            weights[f"{layer}.spline_weight"] = torch.randn(outputs, inputs, 8) / inputs**0.5
            weights[f"{layer}.spline_scaler"] = torch.randn(outputs, inputs)
            weights[f"{layer}.grid"] = knots.repeat(inputs, 1)
    return {prefix + key: value.bfloat16() for key, value in weights.items()}


@pytest.fixture
def save_official(monkeypatch):
    """A function that saves as the authors do: with settings of a package that is not installed afterwards."""

    def save(path, weights, **options):
        package = types.ModuleType("somebody.config")

        def settings(name, *fields):
            made = dataclasses.make_dataclass(name, fields)
            made.__module__ = package.__name__
            setattr(package, name, made)
            return made

        kan = settings("KanConfig", "hidden_dim", "history_depth")
        model = settings("ModelConfig", "device", "kan")
        solver = settings("SolverConfig", "lr", "step_size", "where")
        config = settings("Config", "model", "solver")(
            model(torch.device("cuda:0"), kan(HIDDEN, HISTORY)), solver(1e-4, 500, Path("/data/out"))
        )
        parameters = [torch.nn.Parameter(value) for value in weights.values() if value.is_floating_point()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 500, 0.5)
        model_state = torch.nn.Module().state_dict()  # an OrderedDict with _metadata
        model_state.update(weights)
        checkpoint = {
            "config": config,
            "model": model_state,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "somebody", types.ModuleType("somebody"))
            patch.setitem(sys.modules, "somebody.config", package)
            torch.save(checkpoint, path, **options)
        return path

    return save


def alpha(weights, stage, offsets, knots):
    """The gate in float64, one spline at a time, by the formula of efficient-kan."""

    def basis(x, i, order):
        if order == 0:
            return 1.0 if knots[i] <= x < knots[i + 1] else 0.0
        left = (x - knots[i]) / (knots[i + order] - knots[i])
        right = (knots[i + order + 1] - x) / (knots[i + order + 1] - knots[i + 1])
        return left * basis(x, i, order - 1) + right * basis(x, i + 1, order - 1)

    x = offsets
    for layer in range(3):
        name = f"timestep.{stage}.layers.{layer}"
        base, spline, scaler = (
            weights[f"{name}.{k}"].double() for k in ("base_weight", "spline_weight", "spline_scaler")
        )
        bases = torch.tensor([[basis(v, g, 3) for g in range(8)] for v in x.tolist()], dtype=torch.float64)
        silu = x / (1 + torch.exp(-x))
        x = torch.stack(
            [
                sum(base[o, i] * silu[i] + (spline[o, i] * scaler[o, i] * bases[i]).sum() for i in range(len(x)))
                for o in range(len(base))
            ]
        )
    return x[0]


def closed_loop(weights, plan, times, features, boundaries, knots):
    """The authors' sampling in float64: ``h[last] + alpha (w . h + b)`` over a window with its predictions."""
    window, made = [], []
    for step, t in enumerate(times[:-1].tolist()):
        if plan.is_full(step):
            window.append(features[step])
            continue
        stage = 0 if t > boundaries[0] else 1 if t > boundaries[1] else 2
        weight = weights[f"latent.{stage}.weight"].double()[0]
        latest = torch.stack(window[-len(weight) :])
        z = torch.einsum("k,k...->...", weight[-len(latest) :], latest) + weights[f"latent.{stage}.bias"].double()
        window.append(latest[-1] + alpha(weights, stage, t - times, knots) * z)
        made.append(window[-1])
    return torch.stack(made)


def assert_table_equals_closed_loop(predictor, weights, boundaries, knots):
    """The predictions of the table are those of the authors' sampling, which are returned."""
    plan, times = lesa.StepPlan.paper(STEPS, 4), schedule(STEPS, shift=0.4)
    assert {predictor.config.stage(float(times[s])) for s in plan.predicted_steps} == {1, 2}
    features = torch.randn(STEPS, 5, dtype=torch.float64)
    expected = closed_loop(weights, plan, times, features, boundaries, knots)
    table = predictor.table(plan, times)
    full = features[list(plan.full_steps)]
    made = table.coefficients @ full + table.bias[:, None]
    scale = table.coefficients.abs() @ full.abs() + table.bias.abs()[:, None]
    assert bool(((made - expected).abs() <= 1e-10 * scale).all())
    return made


UNIFORM = [-3 + 1.2 * i for i in range(-3, 9)]
ROUNDED = torch.tensor(UNIFORM).bfloat16().double().tolist()


@pytest.mark.parametrize(("knots", "expected"), [("exact", UNIFORM), ("released", ROUNDED)])
def test_an_official_checkpoint_predicts_by_the_papers_formula(tmp_path, save_official, knots, expected):
    weights = official_weights()
    predictor = lesa.load_official(save_official(tmp_path / "flux.pt", weights), knots=knots)
    config = predictor.config
    assert (config.num_steps, config.hidden_dim, config.windows) == (STEPS, HIDDEN, (4, 8, 8))
    assert (config.boundaries, config.grid_range) == ((0.9, 0.5), (-3.0, 3.0))
    assert_table_equals_closed_loop(predictor, weights, (0.9, 0.5), expected)


def test_released_knots_give_other_gates_than_exact_knots(tmp_path, save_official):
    path = save_official(tmp_path / "flux.pt", official_weights())
    gates = {knots: lesa.load_official(path, knots=knots).gates(schedule(STEPS)) for knots in ("exact", "released")}
    apart = ((gates["exact"] - gates["released"]).abs() / gates["exact"].abs().max()).max()
    assert 1e-5 < apart < 0.1
    layer = lesa.load_official(path, knots="released").timestep[0].layers[0]
    widths = layer.grid[0].diff()
    assert widths.min() == 1.1875
    assert widths.max() == 1.21875


def test_a_guided_checkpoint_has_a_predictor_for_each_branch(tmp_path, save_official):
    cond, uncond = official_weights("_cond", seed=1), official_weights("_uncond", seed=2)
    loaded = lesa.load_official(save_official(tmp_path / "qwen.pt", cond | uncond))
    assert list(loaded) == [("transformer", "cond"), ("transformer", "uncond")]
    for branch, weights in (("cond", cond), ("uncond", uncond)):
        plain = {key.replace(f"_{branch}", ""): value for key, value in weights.items()}
        predictor = loaded["transformer", branch]
        assert predictor.config.boundaries == (0.9, 0.4)
        assert_table_equals_closed_loop(predictor, plain, (0.9, 0.4), UNIFORM)


def test_enable_accepts_a_loaded_checkpoint_with_branches(tmp_path, save_official):
    weights = official_weights("_cond", seed=1) | official_weights("_uncond", seed=2)
    pipeline, plan = tiny.pipeline(), lesa.StepPlan.paper(STEPS, 4)
    loaded = lesa.load_official(save_official(tmp_path / "qwen.pt", weights))
    with lesa.enable(pipeline, loaded, plan) as handle:
        tiny.generate(pipeline, steps=STEPS, guidance=2.0)
        assert [(r.branch, r.full) for r in handle.records] == [(b, list(plan.full_steps)) for b in ("cond", "uncond")]


@given(st.data())
def test_tensors_are_read_as_torch_saved_them(tmp_path_factory, data):
    """Views with any strides and offset, shared storages and every dtype."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]))
    whole = torch.randn(4, 3, 6).mul(100).to(dtype)
    views = {
        "plain": whole,
        "part": whole[1:, :, data.draw(st.integers(0, 5)) :: data.draw(st.integers(1, 4))],
        "turned": whole.permute(data.draw(st.permutations(range(3)))),
        "scalar": whole[0, 0, 0],
        "empty": whole[:0],
        "other": torch.arange(data.draw(st.integers(0, 9))) > 3,
    }
    path = tmp_path_factory.mktemp("views") / "views.pt"
    torch.save(views, path, pickle_protocol=data.draw(st.sampled_from([2, 3, 4, 5])))
    with Archive(path) as file:
        read = {name: file.tensors({name: stored})[name] for name, stored in file.content().items()}
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in views.items())
    assert all(value.is_contiguous() for value in read.values())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "_orig_mod.module.", "module.model._orig_mod."]
)
def test_prefixes_of_wrapper_modules_are_removed_in_any_nesting(tmp_path, save_official, prefix):
    bare = lesa.load_official(save_official(tmp_path / "bare.pt", official_weights()))
    wrapped = lesa.load_official(save_official(tmp_path / "wrapped.pt", official_weights(prefix=prefix)))
    assert all(torch.equal(v, wrapped.state_dict()[k]) for k, v in bare.state_dict().items())


def test_settings_are_read_as_plain_data_without_their_package(tmp_path, save_official):
    path = save_official(tmp_path / "flux.pt", official_weights())
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    assert read_official(path).config == {
        "model": {"device": "cuda:0", "kan": {"hidden_dim": HIDDEN, "history_depth": HISTORY}},
        "solver": {"lr": 1e-4, "step_size": 500, "where": "/data/out"},
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_pickle_protocol_that_torch_can_write_is_read(tmp_path, save_official, protocol):
    path = save_official(tmp_path / "flux.pt", official_weights(), pickle_protocol=protocol)
    assert lesa.load_official(path).config.num_steps == STEPS


def test_knots_changed_by_a_grid_update_are_kept(tmp_path, save_official):
    weights = official_weights()
    moved = (torch.linspace(-2, 2, 12) ** 3).repeat(HIDDEN, 1).bfloat16()
    weights["timestep.1.layers.1.grid"] = moved
    predictor = lesa.load_official(save_official(tmp_path / "moved.pt", weights))
    assert torch.equal(predictor.timestep[1].layers[1].grid, moved.float())
    assert predictor.timestep[1].layers[0].has_uniform_grid


def test_the_convert_command_writes_predictors_that_from_pretrained_reads(tmp_path, save_official, capsys):
    main(["convert", str(save_official(tmp_path / "flux.pt", official_weights())), str(tmp_path / "flux")])
    loaded = lesa.load_official(tmp_path / "flux.pt")
    converted = lesa.LesaPredictor.from_pretrained(tmp_path / "flux")
    assert converted.config == loaded.config
    assert all(torch.equal(v, converted.state_dict()[k]) for k, v in loaded.state_dict().items())
    guided = save_official(tmp_path / "qwen.pt", official_weights("_cond") | official_weights("_uncond", seed=1))
    main(["convert", str(guided), str(tmp_path / "qwen"), "--knots", "released", "--boundaries", "0.8", "0.3"])
    assert "for transformer.cond and transformer.uncond" in capsys.readouterr().out
    for branch in ("cond", "uncond"):
        predictor = lesa.LesaPredictor.from_pretrained(tmp_path / "qwen" / f"transformer.{branch}")
        assert predictor.config.boundaries == (0.8, 0.3)
        assert not predictor.timestep[0].layers[0].has_uniform_grid


# Files that would run code in an ordinary unpickler.


def archive(path, data, entries=(), **options):
    """A zip archive in the layout of torch.save, with any pickle in it."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries:
            file.writestr(name, content)
    return path


class Call:
    """Pickles into a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Attributes:
    """Pickles into a call whose result gets attributes."""

    def __reduce__(self):
        return torch.device, ("cpu",), {"type": "cuda"}


RUN = "open('{0}', 'w').close()"
GLOBAL_OS = b"cposix\nsystem\n"
MALICIOUS = {
    "os.system": (lambda mark: pickle.dumps(Call(os.system, f"touch {mark}"), 2), "posix.system"),
    "eval": (lambda mark: pickle.dumps({"config": Call(eval, RUN.format(mark))}, 2), "__builtin__.eval"),
    "exec, protocol 4": (lambda mark: pickle.dumps(Call(exec, RUN.format(mark)), 4), "builtins.exec"),
    "in the weights": (lambda mark: pickle.dumps({"model": {"a": Call(os.mkdir, str(mark))}}, 2), "posix.mkdir"),
    "getattr": (lambda mark: pickle.dumps(Call(getattr, "torch", "load"), 2), "__builtin__.getattr"),
    "a call whose argument is a call": (
        lambda mark: pickle.dumps(Call(torch.device, Call(eval, RUN.format(mark))), 2),
        "__builtin__.eval",
    ),
    "torch.load": (lambda mark: pickle.dumps(Call(torch.load, str(mark)), 2), "torch.serialization.load"),
    "numpy": (lambda mark: b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R.", "numpy.load"),
    "a call of an unknown class": (
        lambda mark: b"\x80\x02csomebody\nrun\nX\x02\x00\x00\x00id\x85R.",
        "somebody.run",
    ),
    "an unknown class with arguments": (
        lambda mark: b"\x80\x02csomebody\nrun\nX\x02\x00\x00\x00id\x85\x81.",
        "somebody.run",
    ),
    "instructions of protocol 0": (lambda mark: b"(S'id'\niposix\nsystem\n.", "S"),
    "INST": (lambda mark: b"(iposix\nsystem\n.", "posix.system"),
    "OBJ": (lambda mark: b"(" + GLOBAL_OS + b"o.", "posix.system"),
    "NEWOBJ": (lambda mark: b"\x80\x02" + GLOBAL_OS + b")\x81.", "posix.system"),
    "STACK_GLOBAL": (lambda mark: b"\x80\x04\x8c\x05posix\x8c\x06system\x93)R.", "posix.system"),
    "a global from the memo": (
        lambda mark: b"\x80\x02" + GLOBAL_OS + b"q\x00h\x00X\x02\x00\x00\x00id\x85R.",
        "posix.system",
    ),
    "text as a function": (lambda mark: b"\x80\x02X\x09\x00\x00\x00os.system)R.", "to call a str"),
    "an extension": (lambda mark: b"\x80\x02\x82\x01.", "EXT1"),
    "a persistent id": (lambda mark: b"\x80\x02X\x04\x00\x00\x00fileQ.", "not in the file"),
    "attributes of a result": (lambda mark: pickle.dumps(Attributes(), 2), "attributes of a str"),
    "attributes of a stand-in": (
        lambda mark: b"\x80\x02ccollections\nOrderedDict\n}X\x08\x00\x00\x00__code__NsbR.",
        "attributes of a Name",
    ),
    "attributes of a dictionary": (lambda mark: b"\x80\x02}}X\x05\x00\x00\x00itemsNsb.", "attributes of a dict"),
    "a key that is a list": (lambda mark: b"\x80\x02}]Ns.", "a list as a key"),
    "escape codes in a name": (lambda mark: b"\x80\x02cos\n\x1b[2Jsystem\n.", r"os\.\\x1b\[2Jsystem"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_file_is_refused_with_the_reason_and_no_code_runs(tmp_path, name):
    make, named = MALICIOUS[name]
    mark = tmp_path / "was-run"
    path = archive(tmp_path / "malicious.pt", make(mark))
    with pytest.raises(ValueError, match=named if "\\" in named else named.replace(".", r"\.")) as refusal:
        lesa.load_official(path)
    assert str(path) in str(refusal.value)
    assert not mark.exists()
    assert "somebody" not in sys.modules


def test_the_malicious_files_would_run_code_in_pickle(tmp_path):
    mark = tmp_path / "was-run"
    for name in ("os.system", "eval", "exec, protocol 4", "in the weights"):
        pickle.loads(MALICIOUS[name][0](mark))
        assert mark.exists(), name
        mark.rmdir() if mark.is_dir() else mark.unlink()


def storage(kind=b"FloatStorage", key=b"0", numel=4):
    """The pickle of a reference to a storage."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    return b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + number(numel) + b"tQ"


def number(value):
    """The pickle of an integer of 64 bits."""
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(shape, stride, offset=0, **of):
    """The pickle of a tensor."""
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(**of)
        + number(offset)
        + sizes[0]
        + sizes[1]
        + b"\x89Nt"
        + b"R"
    )


def holding(tensor):
    """The pickle of a checkpoint with one weight."""
    name = b"latent.0.weight"
    return b"\x80\x02}X\x05\x00\x00\x00model}X" + struct.pack("<I", len(name)) + name + tensor + b"ss."


@pytest.mark.parametrize(
    ("described", "stored", "why"),
    [
        (tensor((1, 4), (4, 1)), 15, "should have 16 bytes and has 15"),
        (tensor((1, 4), (4, 1), key=b"../../secret"), 16, "should have 16 bytes and has 0"),
        (tensor((1, 5), (5, 1)), 16, r"tensor \[1, 5\] in a storage of 4"),
        (tensor((1, 4), (4, 1), offset=1), 16, "in a storage of 4"),
        (tensor((1 << 40, 1 << 40), (0, 0)), 16, "in a storage of 4"),
        (tensor((1, 1 << 40), (1, 1), numel=1 << 40), 16, "describes tensors of 4398046511104 bytes"),
        (tensor((1, -4), (4, 1)), 16, "as a tensor is none"),
        (tensor((1, 4), (-4, 1)), 16, "as a tensor is none"),
        (tensor((1, 4), (4,)), 16, "with strides"),
        (tensor((1, 4), (4, 1), kind=b"QInt8Storage"), 16, r"torch\.QInt8Storage"),
        (tensor((1, 2), (2, 1), kind=b"LongStorage", numel=2), 16, "are missing"),
        (tensor((1, 4), (4, 1)), 16, "are missing|not those of a LESA predictor"),
    ],
)
def test_a_tensor_that_does_not_match_its_bytes_is_refused(tmp_path, described, stored, why):
    path = archive(tmp_path / "odd.pt", holding(described), [("archive/data/0", bytes(stored))])
    with pytest.raises(ValueError, match=why if "missing" not in why else "not those of a LESA predictor"):
        lesa.load_official(path)


def nested(width, depth):
    """A list of ``width ** depth`` values, whose size as a pickle grows only with ``depth``."""
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


def test_a_small_file_that_describes_large_data_is_refused(tmp_path):
    for number, value in enumerate([nested(10, 9), nested(2, 60), nested(1, 60)]):
        settings = archive(tmp_path / f"settings-{number}.pt", pickle.dumps({"config": value}, 2))
        with pytest.raises(ValueError, match="more than 10000 values or lie more than 20 deep"):
            read_official(settings)
        called = archive(tmp_path / f"called-{number}.pt", pickle.dumps(value, 2)[:-1] + b")R.")
        with pytest.raises(ValueError, match="to call a list"):
            read_official(called)
    path = archive(tmp_path / "large.pt", b"\x80\x02" + b"N" * (1 << 19) + b".")
    with pytest.raises(ValueError, match="at most 262144 are allowed"):
        lesa.load_official(path)
    path = archive(tmp_path / "bomb.pt", bytes(1 << 20), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        lesa.load_official(path)


def test_files_of_other_formats_are_refused_with_the_reason(tmp_path, save_official):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        lesa.load_official(tmp_path / "none.pt")
    whole = save_official(tmp_path / "flux.pt", official_weights())
    legacy = save_official(tmp_path / "legacy.pt", official_weights(), _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6"):
        lesa.load_official(legacy)
    (tmp_path / "short.pt").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut short"):
        lesa.load_official(tmp_path / "short.pt")
    lesa.load_official(whole).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="a safetensors file"):
        lesa.load_official(tmp_path / "ours" / "model.safetensors")
    archive(tmp_path / "script.pt", b"N.", [("archive/constants.pkl", b"N.")], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="TorchScript"):
        lesa.load_official(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ValueError, match=r"one data\.pkl"):
        lesa.load_official(tmp_path / "photos.zip")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a checkpoint is a dictionary, this holds a list"):
        lesa.load_official(tmp_path / "list.pt")
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(tmp_path / "twice.pt", b"N.", [("archive/data.pkl", b"N.")])
    with pytest.raises(ValueError, match="twice"):
        lesa.load_official(tmp_path / "twice.pt")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.pop("latent.2.bias"), "1 weights are missing, such as latent.2.bias"),
        (lambda w: w.update({"latent.3.weight": torch.zeros(1, 8)}), "latent.3.weight"),
        (lambda w: w.update({"head.weight": torch.zeros(1)}), "'head.weight' is no weight of a LESA predictor"),
        (lambda w: w.update({"latent_cond.0.weight": torch.zeros(1, 4)}), "one predictor, or one for cond"),
        (lambda w: w.update({"latent.0.weight": torch.zeros(1, 4, dtype=torch.float64)}), "float64"),
        (lambda w: w.update({"latent.0.weight": torch.zeros(1, 4, dtype=torch.int64)}), "int64"),
        (lambda w: w.update({"latent.0.weight": torch.full((1, 4), torch.nan)}), "NaN"),
        (lambda w: w.update({"module.latent.0.weight": torch.zeros(1, 4)}), "twice, under another prefix"),
        (lambda w: w.update({"timestep.1.layers.1.base_weight": torch.zeros(HIDDEN, 3)}), r"where .* has \[16, 16\]"),
        (lambda w: w.update({"timestep.0.layers.0.grid": torch.zeros(STEPS + 1, 12)}), "grid_range|do not rise"),
        (lambda w: w.update({"timestep.0.layers.0.grid": torch.zeros(STEPS + 1, 40)}), "do not go with 40 knots"),
    ],
)
def test_weights_that_are_not_those_of_a_predictor_are_refused(tmp_path, save_official, change, why):
    weights = official_weights()
    change(weights)
    with pytest.raises(ValueError, match=why):
        lesa.load_official(save_official(tmp_path / "odd.pt", weights))


@given(st.data())
def test_a_damaged_pickle_raises_a_value_error(tmp_path_factory, data):
    buffer = io.BytesIO()
    torch.save({"config": {"a": [1, 2.5, None, (True, "b")]}, "model": official_weights()}, buffer)
    with zipfile.ZipFile(buffer) as file:
        whole = bytearray(file.read("archive/data.pkl")[:4000])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 400))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = archive(tmp_path_factory.mktemp("fuzz") / "damaged.pt", bytes(whole))
    with pytest.raises(ValueError, match=r"damaged\.pt was not opened"):
        lesa.load_official(path)


@example([(6, 255)], 0)  # a version of zip that does not exist
@example([(8, 32)], 0)  # "patched data", which zipfile does not implement
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 40))
def test_a_damaged_archive_is_read_or_raises_a_value_error(tmp_path_factory, changes, missing):
    buffer = io.BytesIO()
    torch.save({"model": official_weights()}, buffer)
    whole = bytearray(buffer.getvalue())
    directory = whole.index(b"PK\x01\x02")
    for place, value in changes:
        whole[directory + place] = value
    path = tmp_path_factory.mktemp("fuzz") / "archive.pt"
    path.write_bytes(whole[: len(whole) - missing])
    with contextlib.suppress(ValueError):
        lesa.load_official(path)


@given(st.binary(max_size=60))
def test_random_bytes_raise_a_value_error(tmp_path_factory, data):
    path = archive(tmp_path_factory.mktemp("fuzz") / "bytes.pt", b"\x80\x02" + data)
    with pytest.raises(ValueError, match=r"bytes\.pt was not opened"):
        lesa.load_official(path)
