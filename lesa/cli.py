"""The command line: ``lesa demo``, ``lesa fit``, ``lesa info``, ``lesa report``; also ``python -m lesa``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lesa
from lesa.plan import StepPlan

DEMO = "demo"  # stands for the model that ships with the package


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends with one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that nobody here needs
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"lesa {options.command}: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"lesa {options.command}: {error}; pip install 'lesa[demo]' brings it")
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lesa", description=(lesa.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lesa {lesa.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="accelerate a small FLUX on handwritten digits and compare")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the report and pictures (%(default)s)")
    demo.add_argument("--held-out", type=int, default=512, metavar="N", help="digits to compare on (%(default)s)")
    demo.add_argument("--rounds", type=int, default=5, metavar="N", help="timing rounds (%(default)s)")
    demo.set_defaults(run=_demo)

    fit = commands.add_parser("fit", help="train a LESA predictor for a diffusers pipeline")
    fit.add_argument("model", help=f"a folder or hub id of a diffusers pipeline, or {DEMO!r}")
    fit.add_argument("--out", type=Path, required=True, help="folder for the predictor")
    fit.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    fit.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    fit.add_argument("--interval", type=int, default=7, help="of the paper's plan (%(default)s)")
    fit.add_argument("--hidden-dim", type=int, default=256, help="width of the gates (%(default)s)")
    fit.add_argument("--epochs", type=int, nargs=2, default=(3, 3), metavar=("GUIDED", "CLOSED"), help="(3 3)")
    fit.add_argument(
        "--latent", choices=("linear", "kan"), default="linear", help="kan: a spline on every feature, too"
    )
    fit.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    fit.add_argument("--features", type=Path, help="folder that keeps the recorded features, to go on after a break")
    fit.add_argument("--tokens", type=int, help="keep a random subset of so many tokens of a feature (all)")
    fit.add_argument("--dtype", choices=("bfloat16", "float32"), help="that features are kept in (as they come)")
    fit.set_defaults(run=_fit)

    report = commands.add_parser("report", help="write the documents' tables and pictures from benchmarks/results")
    report.set_defaults(run=_report)

    convert = commands.add_parser("convert", help="turn a checkpoint of the authors of LESA into safetensors")
    convert.add_argument("checkpoint", type=Path, help="their file; nothing in it is executed")
    convert.add_argument("out", type=Path, help="folder for the predictor, or for a folder for each branch of guidance")
    convert.add_argument(
        "--knots", choices=("exact", "released"), default="exact", help="released: rounded to bfloat16 as in the file"
    )
    convert.add_argument(
        "--boundaries", type=float, nargs="*", help="times that separate the stages (0.9 0.5, with branches 0.9 0.4)"
    )
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="describe a predictor")
    info.add_argument("path", type=Path, help="a folder written by lesa fit or lesa convert")
    info.set_defaults(run=_info)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from lesa.demo.run import run_demo

    run_demo(options.out, held_out=options.held_out, timing_rounds=options.rounds)


def _fit(options: argparse.Namespace) -> None:
    if options.model == DEMO:
        from lesa.demo.model import load_pipeline
        from lesa.demo.run import collect_digits, fit_digits

        fit_digits(collect_digits(load_pipeline()), options.interval, options.latent).save_pretrained(options.out)
        return
    if options.prompts is None:
        raise ValueError("say what to sample: --prompts FILE, one prompt a line")
    import torch

    prompts = [line for line in options.prompts.read_text().splitlines() if line.strip()]
    trajectories = lesa.collect(
        _load_pipeline(options.model),
        prompts,
        seed=options.seed,
        out=options.features,
        tokens=options.tokens,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        num_inference_steps=options.steps,
    )
    plan = StepPlan.paper(options.steps, options.interval)
    config = lesa.LesaConfig(options.steps, hidden_dim=options.hidden_dim, latent=options.latent)
    for stream in trajectories.streams:
        out = options.out if len(trajectories.streams) == 1 else options.out / ".".join(stream)
        predictor = lesa.fit(
            trajectories,
            plan,
            config,
            stream=stream,
            epochs=tuple(options.epochs),
            seed=options.seed,
            checkpoint=out / "training.safetensors",
        )
        predictor.save_pretrained(out)
        print(f"{' '.join(stream)}: {out}")


def _load_pipeline(model: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    cuda = torch.cuda.is_available()
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    return pipeline.to("cuda" if cuda else "cpu")


def _report(_: argparse.Namespace) -> None:
    root = Path(lesa.__file__).parents[1]
    if not (root / "benchmarks" / "report").is_dir():
        raise FileNotFoundError("the report is about a clone of the repository, which this installation is not")
    subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=root, check=True)


def _convert(options: argparse.Namespace) -> None:
    boundaries = None if options.boundaries is None else tuple(options.boundaries)
    loaded = lesa.load_official(options.checkpoint, knots=options.knots, boundaries=boundaries)
    lesa.save(loaded, options.out)
    config = (next(iter(loaded.values())) if isinstance(loaded, dict) else loaded).config
    branches = f", for {' and '.join(map('.'.join, loaded))}" if isinstance(loaded, dict) else ""
    print(f"{config.num_steps} steps, boundaries {config.boundaries}{branches}: {options.out}")


def _info(options: argparse.Namespace) -> None:
    loaded = lesa.load(options.path)
    for stream, forecaster in loaded.items() if isinstance(loaded, dict) else [((), loaded)]:
        if stream:
            print(".".join(stream))
        if isinstance(forecaster, lesa.LesaPredictor):
            _describe(forecaster)


def _describe(predictor: "lesa.LesaPredictor") -> None:
    config = predictor.config
    steps, parameters = config.num_steps or "any number of", sum(p.numel() for p in predictor.parameters())
    print(f"LESA predictor for {steps} steps, {parameters:,} parameters")
    print(f"stages     {len(config.windows)}, boundaries {config.boundaries}, windows {config.windows}")
    print(f"gates      KAN {config.gate_widths}")
    if predictor.schedule is not None:
        times = predictor.schedule.tolist()
        print(f"schedule   {times[0]:.4f}, {times[1]:.4f} ... {times[-2]:.4f}, {times[-1]:.4f}")
    if predictor.plan is not None:
        print(f"plan       {predictor.plan} {predictor.plan.speedup:.2f}x")
    for stage, losses in predictor.losses.items():
        if losses:
            print(
                f"training   {stage}: mean absolute error {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} batches"
            )
