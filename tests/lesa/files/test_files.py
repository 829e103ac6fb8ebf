"""Files are complete or absent, carry a kind and a version, and are refused where they do not fit."""

import copy
import itertools
import json
import multiprocessing
import os
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import lesa
from lesa import Calibration, GramMatrix, LesaConfig, LesaPredictor, StepPlan
from lesa.adapters.diffusers.recorder import prompt_list
from lesa.arguments import real
from lesa.files import locked, read_tensors, write_tensors, write_text
from lesa.training.trajectories import load_shard, save_shard
from lesa_kernels import KANLinear
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.adapters.diffusers.tiny import arguments
from tests.lesa.calibrations import TIMES, calibration, random_gram
from tests.lesa.files.test_fuzz import checkpoint_file, training_state


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


def pipeline_with_other_weights():
    return tiny.pipeline(1)


def test_a_file_has_a_kind_and_a_version_that_are_checked(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {"b": 1}, kind="predictor")
    assert read_tensors(path, kind="predictor").description == {"b": 1}
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete calibration file: it is a predictor file"):
        read_tensors(path, kind="calibration")
    save_file({"a": torch.ones(2)}, path, {"kind": "predictor", "version": "2", "description": "{}"})
    with pytest.raises(ValueError, match="version 2, this library knows 1; install a newer lesa"):
        read_tensors(path, kind="predictor")
    with pytest.raises(FileNotFoundError, match="there is no predictor file"):
        read_tensors(tmp_path / "y", kind="predictor")


def test_loaded_values_do_not_change_if_the_file_does(tmp_path):
    gram, path = random_gram(), tmp_path / "gram.safetensors"
    gram.save(path)
    read, before = GramMatrix.load(path), gram.matrix.clone()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert torch.equal(read.matrix, before)
    path.write_bytes(b"")
    assert torch.equal(read.matrix, before)


def test_a_file_is_replaced_and_not_written_in_place(tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration().save(path)
    before, held = path.stat().st_ino, os.open(path, os.O_RDONLY)
    calibration(seed=1).save(path)
    assert path.stat().st_ino != before
    os.close(held)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_a_write_error_names_the_file_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "gram.safetensors"
    random_gram().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"gram\.safetensors cannot be written: No space left on device"):
        random_gram(seed=1).save(path)
    with pytest.raises(OSError, match=r"text cannot be written"):
        write_text(tmp_path / "text", "x")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["gram.safetensors"]


def test_saving_into_a_path_that_is_a_file_names_it(tmp_path):
    (tmp_path / "taken").write_text("")
    for save in (calibration().save, LesaPredictor(LesaConfig(4, hidden_dim=2)).save_pretrained):
        with pytest.raises(OSError, match="taken"):
            save(tmp_path / "taken")


def test_impossible_output_errors_are_refused():
    errors = lesa.OutputErrorGram.from_gram(random_gram())
    errors.vectors.mul_(1e200)
    with pytest.raises(ValueError, match="no inner products of errors; calibrate again"):
        lesa.PathLeastSquares(errors).table(StepPlan(errors.num_steps, [0, 2]), TIMES)
    errors = lesa.OutputErrorGram.from_gram(random_gram())
    errors.lengths.mul_(1e-300)
    with pytest.raises(ValueError, match="lengths that nothing can keep; calibrate again"):
        lesa.PathLeastSquares(errors).table(StepPlan(errors.num_steps, [0, 2]), TIMES)


def same_weights(a, b):
    """Whether two predictors have equal weights."""
    theirs = b.state_dict()
    return len(theirs) == len(a.state_dict()) and all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("stop_after", range(8))
def test_an_interrupted_save_leaves_the_old_or_the_new_predictor(tmp_path, monkeypatch, stop_after):
    """Stopped after any number of changes of the folder, it holds the old predictor or the new one."""
    old, new = (LesaPredictor(LesaConfig(4, hidden_dim=width)) for width in (2, 3))
    old.save_pretrained(tmp_path)
    calls = itertools.count()

    def stopping(change):
        def call(*args, **kwargs):
            if next(calls) == stop_after:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", stopping(os.replace))
    monkeypatch.setattr(os, "unlink", stopping(os.unlink))
    try:
        new.save_pretrained(tmp_path)
        assert stop_after > 2, "saving replaces three files"
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    read = lesa.load(tmp_path)
    assert same_weights(read, new if read.config == new.config else old)
    new.save_pretrained(tmp_path)
    assert same_weights(lesa.load(tmp_path), new)


def test_a_full_disk_leaves_the_older_predictor_complete(tmp_path, monkeypatch):
    old, new = (LesaPredictor(LesaConfig(4, hidden_dim=width)) for width in (2, 3))
    old.save_pretrained(tmp_path)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lesa.files.tensors.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*No space left"):
        new.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "gates | KAN [5, 2, 2, 1]" in (tmp_path / "README.md").read_text()
    assert same_weights(lesa.load(tmp_path), old)


@pytest.mark.parametrize("differ", ["config", "schedule", "plan", "losses"])
def test_weights_with_the_config_of_another_predictor_are_refused(tmp_path, differ):
    one, other = (LesaPredictor(LesaConfig(4, hidden_dim=2)) for _ in range(2))
    if differ == "config":
        other = LesaPredictor(LesaConfig(4, hidden_dim=2, boundaries=(0.8, 0.4)))
    elif differ == "schedule":
        other.schedule = torch.linspace(1, 0, 5, dtype=torch.float64)
    elif differ == "plan":
        other.plan = StepPlan(4, [0, 2])
    else:
        other.losses = {"guided": [0.5]}
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "other")
    with pytest.raises(ValueError, match=rf"other.config\.json .*{differ}.*model\.safetensors"):
        lesa.load(tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    assert lesa.load(tmp_path / "other").config == other.config


def test_a_folder_with_one_predictor_and_one_per_branch_is_refused(tmp_path):
    made = LesaPredictor(LesaConfig(4, hidden_dim=2))
    made.save_pretrained(tmp_path)
    lesa.save({("transformer", "cond"): made}, tmp_path)
    with pytest.raises(ValueError, match=r"both a predictor and .*transformer\.cond"):
        lesa.load(tmp_path)


def test_a_readme_of_the_user_is_kept_in_any_encoding(tmp_path):
    text = "caf\xe9".encode("latin-1")
    (tmp_path / "README.md").write_bytes(text)
    made = LesaPredictor(LesaConfig(4, hidden_dim=2))
    made.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text
    assert same_weights(lesa.load(tmp_path), made)


def test_a_failed_write_of_the_model_card_leaves_the_old_card(tmp_path, monkeypatch):
    made = LesaPredictor(LesaConfig(4, hidden_dim=2))
    made.save_pretrained(tmp_path)
    before, replace = (tmp_path / "README.md").read_text(), os.replace

    def full(source, target):
        if os.path.basename(target) == "README.md":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    new = LesaPredictor(LesaConfig(4, hidden_dim=3))
    with pytest.raises(OSError, match=r"README\.md cannot be written: No space left"):
        new.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    assert same_weights(lesa.load(tmp_path), new)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "\xff",
        '{"method": "a"}',
        "[3]",
        '[{"samples": [1]}]',
        '[{"environment": 3}]',
        '[{"environment": {"versions": 3}}]',
    ],
    ids=range(8),
)
def test_an_invalid_report_is_refused_and_named_before_anything_is_written(tmp_path, text):
    (tmp_path / "rows.json").write_bytes(text.encode("latin-1"))
    made = LesaPredictor(LesaConfig(4, hidden_dim=2))
    with pytest.raises(ValueError, match=r"rows\.json is no report: "):
        made.save_pretrained(tmp_path / "out", report=tmp_path / "rows.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"transformer.cond.errors": torch.zeros(1, dtype=torch.float64)}),
        lambda t: t.update({"times": torch.linspace(1, 0, 142, dtype=torch.float64)}),
        lambda t: t.update({"times": torch.linspace(1, 0, 90, dtype=torch.float64)}),
        lambda t: t.update({"times": t["times"] * 1000}),
        lambda t: t.update({"times": t["times"].float()}),
        lambda t: t.update({"times": t["times"].flip(0)}),
        lambda t: t.update({"transformer.cond.power": -t["transformer.cond.power"]}),
        lambda t: t.update({"transformer.cond.power": t["transformer.cond.power"] * float("nan")}),
        lambda t: t.update({"transformer.cond.gram": t["transformer.cond.gram"][:-1, :-1].clone()}),
        lambda t: t.update({"transformer.cond.gram": -t["transformer.cond.gram"]}),
        lambda t: t.update({"transformer.cond.gram": t["transformer.cond.gram"].tril()}),
        lambda t: t.update({"transformer.cond.lengths": torch.zeros(2, 2, dtype=torch.float64)}),
        lambda t: t.update({"transformer.cond.errors": t["transformer.cond.errors"][:-1].clone()}),
        lambda t: t["transformer.cond.errors"][3:].mul_(float("inf")),
        lambda t: t.pop("transformer.cond.lengths"),
        lambda t: t.pop("transformer.cond.gram"),
        lambda t: t.pop("times"),
    ],
)
def test_a_calibration_with_inconsistent_tensors_is_refused(tmp_path, change):
    made = calibration()
    made.streams["transformer", "cond"].output_errors = lesa.OutputErrorGram.from_gram(random_gram())
    made.save(tmp_path)
    path = tmp_path / "calibration.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, header)
    with pytest.raises(ValueError, match=r"calibration\.safetensors is not a complete calibration file"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()}),
        lambda w: w.update({k: v.to(torch.complex64) for k, v in w.items()}),
        lambda w: w.update({k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
        lambda w: w.update({"latent.0.weight": w["latent.0.weight"] * float("nan")}),
        lambda w: w.update(
            {"timestep.0.layers.0.spline_weight": w["timestep.0.layers.0.spline_weight"].to(torch.int8)}
        ),
        lambda w: w.update({"timestep.0.layers.0.grid": w["timestep.0.layers.0.grid"].flip(-1).contiguous()}),
        lambda w: w.update({"timestep.0.layers.0.grid": torch.zeros_like(w["timestep.0.layers.0.grid"])}),
    ],
)
def test_weights_that_are_not_floats_or_not_splines_are_refused(tmp_path, change):
    LesaPredictor(LesaConfig(4, hidden_dim=2)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        LesaPredictor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hidden_dim": 4.0}, "hidden_dim"),
        ({"hidden_dim": True}, "hidden_dim"),
        ({"grid_range": (0, float("inf"))}, "grid_range"),
        ({"grid_range": (1, 0)}, "grid_range"),
        ({"grid_range": 3}, "grid_range"),
        ({"grid_size": 0}, "grid_size"),
        ({"grid_size": None}, "grid_size"),
        ({"spline_order": None}, "spline_order"),
        ({"hidden_dim": None}, "hidden_dim"),
        ({"grid_size": 10**9}, "grid_size"),
        ({"spline_order": 1.5}, "spline_order"),
        ({"history": 0}, "history"),
        ({"boundaries": "0.9"}, "boundaries"),
        ({"boundaries": (float("nan"),)}, "boundaries"),
        ({"num_steps": 2.5}, "num_steps"),
    ],
)
def test_an_invalid_config_value_is_refused_by_its_name(options, name):
    with pytest.raises(ValueError, match=name):
        LesaConfig(**{"num_steps": 4, **options})


def test_loading_a_predictor_does_not_fit_splines(tmp_path, monkeypatch):
    predictor = LesaPredictor(LesaConfig(2, hidden_dim=1, grid_size=64))
    predictor.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "lstsq", None)
    monkeypatch.setattr(KANLinear, "curve2coeff", None)  # nor on meta tensors, which is slow too
    read = LesaPredictor.from_pretrained(tmp_path)
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in predictor.state_dict().items())


def test_a_folder_with_features_of_another_model_is_refused(pipeline, tmp_path):
    lesa.collect(pipeline, [arguments()], out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="collected for other weights"):
        lesa.collect(pipeline_with_other_weights(), [arguments()], out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="collected for other tokens"):
        lesa.collect(pipeline, [arguments()], out=tmp_path, tokens=4, progress=False)
    lesa.collect(copy.deepcopy(pipeline), [arguments()], out=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"tokens": 4}, "tokens"), ({"size": 96}, "resolution"), ({"other": True}, "weights")],
    ids=["tokens", "resolution", "model"],
)
def test_a_calibration_continues_only_with_the_same_model_and_settings(pipeline, tmp_path, change, what):
    options = {"search": False, "progress": False, "out": tmp_path}
    lesa.calibrate(pipeline, [arguments(seed=0)], **options)
    target = pipeline_with_other_weights() if change.pop("other", False) else pipeline
    size = change.pop("size", 64)
    with pytest.raises(ValueError, match=what):
        lesa.calibrate(target, [arguments(seed=1, size=size)], **options, **change)
    made = lesa.calibrate(pipeline, [arguments(seed=1)], **options)
    assert len(made.requests) == 2


def calibrate_one_call(folder, seed, turn):
    """The work of one process, which waits until both have started."""
    torch.set_num_threads(1)
    turn.wait()
    lesa.calibrate(tiny.pipeline(), [arguments(seed=seed)], out=folder, search=False, progress=False)


def test_two_processes_can_calibrate_into_one_folder(tmp_path):
    """Each process has its own call, and both run at once."""
    context = multiprocessing.get_context("spawn")
    turn = context.Barrier(2)
    workers = [context.Process(target=calibrate_one_call, args=(tmp_path, seed, turn)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(Calibration.load(tmp_path).requests) == 2


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    with locked(tmp_path / "x"):
        from filelock import FileLock, Timeout

        with pytest.raises(Timeout), FileLock(tmp_path / ".x.lock", timeout=0):
            pass


def test_one_prompt_is_one_call():
    assert prompt_list("a cat") == ["a cat"]
    assert prompt_list({"prompt": "a cat"}) == [{"prompt": "a cat"}]
    assert prompt_list(["a", ["b", "c"]]) == ["a", ["b", "c"]]
    for none in ([], (), None, 3):
        with pytest.raises(ValueError, match="no prompts"):
            prompt_list(none)
    with pytest.raises(ValueError, match="not int"):
        prompt_list([3])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": "float32"}, "dtype"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 2.5}, "tokens"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_invalid_numbers_are_refused_before_sampling(options, name):
    for function in (lesa.collect, lesa.calibrate):
        if function is lesa.calibrate and name == "dtype":
            continue
        with pytest.raises(ValueError, match=f"^{name}"):
            function(None, ["a"], progress=False, **options)


def test_a_damaged_shard_is_refused_and_named(tmp_path):
    path = tmp_path / "trajectories-00000.safetensors"
    write_tensors(path, {"0": torch.zeros(1, 4, 2)}, {"times": [1, 0], "streams": [["a", "b"]]}, kind="trajectory")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_shard(path)


def test_files_without_a_version_are_refused(tmp_path):
    sentence = "it has no version: this library did not write it, or one before versions did"
    path = tmp_path / "gram.safetensors"
    save_file(random_gram().tensors(), path)
    with pytest.raises(ValueError, match=sentence):
        GramMatrix.load(path)
    shard = tmp_path / "trajectories-00000.safetensors"
    save_file({"0": torch.zeros(1, 1, 2, 2)}, shard, {"times": "[1, 0]", "streams": '[["a", "b"]]', "request": "x"})
    with pytest.raises(ValueError, match=sentence):
        load_shard(shard)
    path = tmp_path / "calibration.safetensors"
    calibration().save(path)
    save_file(load_file(path), path, {"calibration": "{}"})
    with pytest.raises(ValueError, match=sentence):
        lesa.load(tmp_path)
    weights, config = (tmp_path / "predictor" / name for name in ("model.safetensors", "config.json"))
    LesaPredictor(LesaConfig(4, hidden_dim=2)).save_pretrained(tmp_path / "predictor")
    description = json.loads(config.read_text())
    save_file(load_file(weights), weights, {"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        lesa.load(tmp_path / "predictor")
    del description["version"]
    config.write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match="it has no version: this library did not write it, or one before versions did"
    ):
        lesa.load(tmp_path / "predictor")


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["above", "below"])
def test_an_integer_too_large_for_a_float_is_refused_by_name(number):
    with pytest.raises(ValueError, match=r"^speedup must be a number"):
        real("speedup", number)


def test_tensors_that_share_memory_are_saved_separately(tmp_path):
    made = calibration()
    made.streams["transformer", "uncond"] = made.streams["transformer", "cond"]
    made.save(tmp_path)
    read = Calibration.load(tmp_path)
    for measured_ in read.streams.values():
        assert torch.equal(measured_.gram.matrix, made.streams["transformer", "cond"].gram.matrix)
    both = torch.arange(6.0)
    write_tensors(tmp_path / "x", {"a": both[:4], "b": both[2:], "c": both}, kind="gram")
    tensors = read_tensors(tmp_path / "x", kind="gram").tensors
    assert [tensors[name].tolist() for name in "abc"] == [[0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 4, 3, 0)])
def test_an_empty_shard_is_refused(tmp_path, shape):
    path = tmp_path / "trajectories-00000.safetensors"
    save_shard(path, torch.linspace(1, 0, 5), {("transformer", "cond"): torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"trajectories-00000.*collect again"):
        load_shard(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64])
def test_a_shard_of_an_unsupported_dtype_is_refused(tmp_path, dtype):
    path = tmp_path / "trajectories-00000.safetensors"
    save_shard(path, torch.linspace(1, 0, 5), {("transformer", "cond"): torch.zeros(2, 4, 3).to(dtype)})
    with pytest.raises(ValueError, match=rf"trajectories-00000.*{dtype}"):
        load_shard(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, d: d.update(batches=2),
        lambda t, d: d.update(losses={"guided": [10**400], "closed loop": []}),
        lambda t, d: d.update(losses={"guided": [float("nan")], "closed loop": []}),
        lambda t, d: t["optimizer.0.step"].neg_(),
        lambda t, d: t["optimizer.0.exp_avg_sq"].sub_(1),
    ],
    ids=["batches", "loss of 400 digits", "NaN loss", "negative step", "negative squares"],
)
def test_an_inconsistent_training_checkpoint_is_refused(tmp_path, change):
    state, path = training_state(), checkpoint_file(tmp_path)
    state.restore(path, {"seed": 1})
    file = read_tensors(path, kind="training checkpoint")
    change(file.tensors, file.description)
    write_tensors(path, file.tensors, file.description, kind="training checkpoint")
    with pytest.raises(ValueError, match=r"training\.safetensors.*remove it to start again"):
        training_state().restore(path, {"seed": 1})
