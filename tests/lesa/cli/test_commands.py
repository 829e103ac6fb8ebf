"""The command line: info, fit and evaluate, and mistakes in their arguments."""

import json
import subprocess
import sys

import pytest
import torch

import lesa
from lesa.cli.commands import main
from tests.lesa.adapters.diffusers import tiny


def test_info_describes_a_predictor(tmp_path, capsys):
    predictor = lesa.LesaPredictor(lesa.LesaConfig(10, hidden_dim=8))
    predictor.schedule, predictor.losses = torch.linspace(1, 0, 11), {"guided": [0.5, 0.25], "closed loop": []}
    predictor.save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    out = capsys.readouterr().out
    assert "for 10 steps" in out
    assert "KAN [11, 8, 8, 1]" in out
    assert "training, guided      mean absolute error 0.5000 to 0.2500 in 2 batches" in out
    predictor.plan = lesa.StepPlan.paper(10, 4)
    lesa.save({("transformer", "cond"): predictor, ("transformer", "uncond"): predictor}, tmp_path / "both")
    main(["info", str(tmp_path / "both")])
    out = capsys.readouterr().out
    assert out.startswith("transformer.cond\nLESA predictor for 10 steps")
    assert "\ntransformer.uncond\n" in out
    assert "full steps            0, 1, 2, 3, 6 (2.00x fewer than all)" in out


def test_info_describes_a_calibration(tmp_path, capsys):
    calibration = lesa.calibrate(tiny.pipeline(), [tiny.arguments()], search=False, progress=False)
    calibration.plan(4)
    calibration.save(tmp_path)
    main(["info", str(tmp_path)])
    out = capsys.readouterr().out
    assert "10 steps on 2 samples" in out
    assert "streams    transformer.cond\n" in out
    assert "plans      4 full steps" in out


def error_of(capsys, *arguments):
    """The last line on stderr of a command with wrong arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_wrong_arguments_give_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    def load(model):
        raise AssertionError("the model was loaded before the arguments were checked")

    monkeypatch.setattr("lesa.cli.commands.load_model", load)
    (tmp_path / "file").write_text("a cat")
    (tmp_path / "empty").write_text("")
    file, out = tmp_path / "file", tmp_path / "out"
    assert "holds nothing that lesa has written" in error_of(capsys, "info", tmp_path)
    assert "there is no folder" in error_of(capsys, "info", tmp_path / "nowhere")
    assert "--prompts FILE" in error_of(capsys, "fit", "some/model", "--out", out)
    assert "is a file; name a folder" in error_of(capsys, "fit", "some/model", "--out", file, "--prompts", file)
    assert "is a file; name a folder" in error_of(capsys, "fit", "some/model", "--out", file / "x", "--prompts", file)
    assert "is a folder; name a file" in error_of(
        capsys, "calibrate", "some/model", "--out", out, "--prompts", tmp_path
    )
    assert "is not there" in error_of(capsys, "calibrate", "some/model", "--out", out, "--prompts", tmp_path / "x")
    assert "no prompt in" in error_of(capsys, "calibrate", "some/model", "--out", out, "--prompts", tmp_path / "empty")
    assert "at least 1" in error_of(capsys, "calibrate", "some/model", "--out", out, "--steps", "0")
    assert "at least 1" in error_of(capsys, "fit", "some/model", "--out", out, "--interval", "0")
    assert "at least 1" in error_of(capsys, "evaluate", "some/model", "--out", out, "--rounds", "0")
    assert "at least 1" in error_of(capsys, "demo", "--held-out", "0")
    options = ["--out", out, "--prompts", file, "--forecasters", "taylor:ordr=2"]
    assert "taylor cannot be made with ordr=2" in error_of(capsys, "evaluate", "some/model", *options)
    assert "invalid choice" in error_of(capsys, "fly")
    assert not out.exists()


def test_a_missing_model_is_named(tmp_path, capsys):
    (tmp_path / "prompts").write_text("a cat")
    options = ["--out", tmp_path / "out", "--prompts", tmp_path / "prompts"]
    said = error_of(capsys, "calibrate", tmp_path / "nowhere", *options)
    assert "nowhere cannot be loaded" in said


def test_a_calibration_of_another_model_is_refused(tmp_path, capsys):
    lesa.calibrate(tiny.pipeline(), [tiny.arguments()], search=False, progress=False, out=tmp_path)
    options = ["--calibration", tmp_path, "--plans", "even:4", "--forecasters", "least-squares"]
    assert "this calibration was made for" in error_of(capsys, "evaluate", "demo", "--out", tmp_path, *options)


def test_a_closed_output_pipe_gives_no_traceback(tmp_path):
    calibration = lesa.calibrate(tiny.pipeline(), [tiny.arguments()], search=False, progress=False)
    calibration.save(tmp_path)
    run = subprocess.Popen(
        [sys.executable, "-m", "lesa", "info", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    assert b"Traceback" not in run.stderr.read()
    run.wait()


def test_fit_trains_and_saves_a_predictor(tmp_path, monkeypatch, capsys):
    pipeline = tiny.pipeline()
    monkeypatch.setattr("lesa.cli.commands.load_model", lambda model: pipeline)
    # this pipeline has no text encoder: each prompt stands for an embedding
    embeddings = {text: tiny.arguments(seed=i) for i, text in enumerate(("a cat", "a dog"))}
    call = type(pipeline).__call__

    def with_prompt(self, prompt=None, num_inference_steps=None, generator=None):
        made = embeddings[prompt] | {"num_inference_steps": num_inference_steps, "generator": generator}
        return call(self, **made)

    monkeypatch.setattr(type(pipeline), "__call__", with_prompt)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "10", "--interval", "4", "--hidden-dim", "4"]
    main(["fit", "tiny", *options, "--out", str(tmp_path / "made"), "--features", str(tmp_path / "features")])
    assert "transformer cond" in capsys.readouterr().out
    predictor = lesa.LesaPredictor.from_pretrained(tmp_path / "made")
    assert predictor.config.num_steps == 10
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_python_m_lesa_runs_the_command_line():
    run = subprocess.run([sys.executable, "-m", "lesa", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"lesa {lesa.__version__}"


def test_lesa_works_without_triton_diffusers_and_plotting_libraries():
    absent = ["triton", "diffusers", "transformers", "matplotlib", "sklearn", "torchmetrics", "rich"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import lesa, lesa_kernels, torch
table = lesa.Taylor(1).table(lesa.StepPlan(4, [0, 1]), [1.0, 0.7, 0.4, 0.2])
print(lesa_kernels.combine(torch.ones(2, 3), table.coefficients.float()).tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]"


def test_lesa_kernels_does_not_import_lesa():
    code = "import sys, lesa_kernels; print([m for m in sys.modules if m == 'lesa' or m.startswith('lesa.')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_evaluate_compares_forecasters_and_plans_on_the_demo_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lesa.demo.run.HELD_OUT_SEEDS", range(4))
    options = ["--forecasters", "reuse", "taylor:order=2,variable=time", "--plans", "even:4", "--steps", "10"]
    main(["evaluate", "demo", "--out", str(tmp_path), *options])
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["full_steps"] for row in rows] == [10, 4, 4]
    assert rows[2]["psnr"] > rows[1]["psnr"]
    assert (tmp_path / "quality.png").exists()
    assert "4 samples against the full sampler" in " ".join(capsys.readouterr().out.split())
    said = error_of(capsys, "evaluate", "demo", "--out", tmp_path, "--plans", "best:4")
    assert "lesa evaluate: best:4 needs a calibration" in said
