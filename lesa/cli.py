"""The command line: ``lesa demo``, ``lesa calibrate``, ``lesa plan``, ``lesa fit`` ...; also ``python -m lesa``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import lesa
from lesa.plan import StepPlan

DEMO = "demo"  # stands for the model that ships with the package


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends with one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that nobody here needs
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        _fail(options.command, str(error))
    except ModuleNotFoundError as error:
        _fail(options.command, f"{error}; pip install 'lesa[demo]' brings it")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(command: str, message: str) -> NoReturn:
    print(f"lesa {command}: {message}", file=sys.stderr)
    sys.exit(2)


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _natural(text: str) -> int:
    """A whole number of at least 0."""
    return int(text) if text == "0" else _count(text)


def _folder(text: str) -> Path:
    """A folder, or one that can be made."""
    path = Path(text)
    existing = next((part for part in (path, *path.parents) if part.exists()), path)
    if existing.exists() and not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is a file; name a folder")
    return path


def _file(text: str) -> Path:
    """A file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a file")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lesa", description=(lesa.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lesa {lesa.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="accelerate a small FLUX on handwritten digits and compare")
    demo.add_argument(
        "--out", type=_folder, default=Path("out"), help="folder for the report and pictures (%(default)s)"
    )
    demo.add_argument("--held-out", type=_count, default=512, metavar="N", help="digits to compare on (%(default)s)")
    demo.add_argument("--rounds", type=_natural, default=5, metavar="N", help="timing rounds (%(default)s)")
    demo.set_defaults(run=_demo)

    calibrate = commands.add_parser("calibrate", help="measure once what plans and forecasters for any budget need")
    calibrate.add_argument("model", help=f"a folder or hub id of a diffusers pipeline, or {DEMO!r}")
    calibrate.add_argument("--out", type=_folder, required=True, help="folder for calibration.safetensors")
    calibrate.add_argument("--prompts", type=_file, help="a text file, one prompt a line; 4 to 16 are enough")
    calibrate.add_argument("--steps", type=_count, default=50, help="denoising steps (%(default)s)")
    calibrate.add_argument("--tokens", type=_count, default=1024, help="of each feature that count (%(default)s)")
    calibrate.add_argument(
        "--refine", type=_count, nargs="+", metavar="N", help="try several plans of so many full steps on the prompts"
    )
    calibrate.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    calibrate.set_defaults(run=_calibrate)

    plan = commands.add_parser("plan", help="the best full steps for a budget, from a calibration")
    plan.add_argument("calibration", type=Path, help="a folder written by lesa calibrate")
    budget = plan.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_count, metavar="N", help="so many full steps")
    budget.add_argument("--speedup", type=float, metavar="X", help="at least so many times fewer full steps")
    budget.add_argument("--max-error", type=float, metavar="E", help="the fewest that keep this predicted error")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("evaluate", help="compare forecasters and plans with the full sampler")
    evaluate.add_argument("model", help=f"a folder or hub id of a diffusers pipeline, or {DEMO!r}")
    evaluate.add_argument("--out", type=_folder, required=True, help="folder for evaluation.json and pictures")
    evaluate.add_argument("--prompts", type=_file, help="a text file, one prompt a line, that no calibration has seen")
    evaluate.add_argument("--calibration", type=Path, help="a folder written by lesa calibrate")
    evaluate.add_argument(
        "--forecasters",
        nargs="+",
        metavar="NAME",
        default=["reuse", "taylor:order=2", "default"],
        help="such as reuse, taylor:order=2, least-squares, default, or a predictor's folder (%(default)s)",
    )
    evaluate.add_argument(
        "--plans",
        nargs="+",
        metavar="PLAN",
        help="such as paper:7 (interval), even:10 or best:10 (full steps), own (paper and best at three budgets)",
    )
    evaluate.add_argument("--steps", type=_count, default=50, help="denoising steps (%(default)s)")
    evaluate.add_argument("--rounds", type=_count, default=1, metavar="N", help="timing rounds (%(default)s)")
    evaluate.add_argument("--metrics", nargs="+", metavar="NAME", help="psnr, ssim, lpips, ... (all that can be had)")
    evaluate.add_argument("--seed", type=int, default=1000, help="(%(default)s)")
    evaluate.set_defaults(run=_evaluate)

    fit = commands.add_parser("fit", help="train a LESA predictor for a diffusers pipeline")
    fit.add_argument("model", help=f"a folder or hub id of a diffusers pipeline, or {DEMO!r}")
    fit.add_argument("--out", type=_folder, required=True, help="folder for the predictor")
    fit.add_argument("--prompts", type=_file, help="a text file, one prompt a line")
    fit.add_argument("--steps", type=_count, default=50, help="denoising steps (%(default)s)")
    fit.add_argument("--interval", type=_count, default=7, help="of the paper's plan (%(default)s)")
    fit.add_argument("--hidden-dim", type=_count, default=256, help="width of the gates (%(default)s)")
    fit.add_argument("--epochs", type=_natural, nargs=2, default=(3, 3), metavar=("GUIDED", "CLOSED"), help="(3 3)")
    fit.add_argument(
        "--latent", choices=("linear", "kan"), default="linear", help="kan: a spline on every feature, too"
    )
    fit.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    fit.add_argument("--features", type=_folder, help="folder that keeps the recorded features, to go on after a break")
    fit.add_argument("--tokens", type=_count, help="keep a random subset of so many tokens of a feature (all)")
    fit.add_argument("--dtype", choices=("bfloat16", "float32"), help="that features are kept in (as they come)")
    fit.set_defaults(run=_fit)

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

    info = commands.add_parser("info", help="describe a predictor or a calibration")
    info.add_argument("path", type=Path, help="a folder written by lesa fit, lesa calibrate or lesa convert")
    info.set_defaults(run=_info)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from lesa.demo.run import run_demo

    run_demo(options.out, held_out=options.held_out, timing_rounds=options.rounds)


def _calibrate(options: argparse.Namespace) -> None:
    pipeline, calls, keywords = _pipeline_and_calls(options)
    calibration = lesa.calibrate(
        pipeline,
        calls,
        seed=options.seed,
        tokens=options.tokens,
        out=options.out,
        **keywords,
    )
    if options.refine:
        gains = lesa.refine_plans(pipeline, calibration, calls, options.refine, seed=options.seed, **keywords)
        calibration.save(options.out)
        for count, gain in gains.items():
            print(f"{count} full steps: {gain:.1%} of the distance that the plan of the least predicted error leaves")
    print(f"{calibration.describe()}: {options.out}")


def _plan(options: argparse.Namespace) -> None:
    calibration = lesa.Calibration.load(options.calibration)
    given = {"full_steps": options.steps, "speedup": options.speedup, "max_error": options.max_error}
    budget = {name: value for name, value in given.items() if value is not None}
    if not budget:
        print("full steps  ideal  predicted error of the sample")
        for count, error in calibration.curve().items():
            print(f"{count:10d}  {calibration.num_steps / count:4.2f}x  {error:.5f}")
        return
    plan = calibration.plan(**budget)
    error = lesa.sample_error(calibration.errors(), plan, calibration.times)
    print(plan)
    print(f"full steps {', '.join(map(str, plan.full_steps))}")
    print(f"{len(plan.full_steps)} of {plan.num_steps}, {plan.speedup:.2f}x ideal, predicted error {error:.5f}")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from lesa.adapters.diffusers.handle import find_transformers
    from lesa.calibration.calibrating import describe_model
    from lesa.evaluation.columns import console_table
    from lesa.evaluation.evaluate import evaluate
    from lesa.evaluation.grid import default_plans, grid
    from lesa.evaluation.pictures import draw

    calibration = None if options.calibration is None else lesa.Calibration.load(options.calibration)
    methods = grid(options.forecasters, options.plans or default_plans(options.steps, calibration), calibration)
    pipeline, calls, keywords = _pipeline_and_calls(options, held_out=True)
    if calibration is not None:
        calibration.check_model(describe_model(find_transformers(pipeline)))
    rows = evaluate(
        pipeline,
        methods,
        calls,
        seed=options.seed,
        metrics=options.metrics,
        rounds=options.rounds,
        out=options.out,
        **keywords,
    )
    draw(options.out, rows, calibration)
    Console().print(console_table(rows, title=f"{rows[0]['samples']} samples against the full sampler"))
    print(f"evaluation.json and pictures: {options.out}")


def _pipeline_and_calls(
    options: argparse.Namespace, *, held_out: bool = False
) -> tuple[Any, list[Any], dict[str, Any]]:
    """What to sample with, the calls to make, and keyword arguments of each."""
    if options.model == DEMO:
        from lesa.demo.measure import call_of
        from lesa.demo.model import images_of, load_pipeline
        from lesa.demo.run import CALIBRATION_SEEDS, HELD_OUT_SEEDS

        if held_out:
            return load_pipeline(), [call_of(HELD_OUT_SEEDS[:256], options.steps)], {"images": images_of}
        return load_pipeline(), [call_of(CALIBRATION_SEEDS, options.steps)], {}
    keywords = {"num_inference_steps": options.steps} | ({"output_type": "pt"} if held_out else {})
    prompts = _read_prompts(options.prompts)  # first, since a model takes a while
    return _load_pipeline(options.model), prompts, keywords


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        raise ValueError("say what to sample: --prompts FILE, one prompt a line")
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"there is no prompt in {path}")
    return prompts


def _fit(options: argparse.Namespace) -> None:
    if options.model == DEMO:
        from lesa.demo.model import load_pipeline
        from lesa.demo.run import collect_digits, fit_digits

        fit_digits(collect_digits(load_pipeline()), options.interval, options.latent).save_pretrained(options.out)
        return
    import torch

    plan = StepPlan.paper(options.steps, options.interval)  # what is wrong is said before anything is sampled
    config = lesa.LesaConfig(options.steps, hidden_dim=options.hidden_dim, latent=options.latent)
    prompts = _read_prompts(options.prompts)
    trajectories = lesa.collect(
        _load_pipeline(options.model),
        prompts,
        seed=options.seed,
        out=options.features,
        tokens=options.tokens,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        num_inference_steps=options.steps,
    )
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
    dtype = torch.bfloat16 if cuda else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except Exception as error:  # of many kinds, by diffusers, transformers and the hub; each is about the model
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"the model {model} cannot be loaded: {reason}") from error
    return pipeline.to("cuda" if cuda else "cpu")


def _convert(options: argparse.Namespace) -> None:
    boundaries = None if options.boundaries is None else tuple(options.boundaries)
    loaded = lesa.load_official(options.checkpoint, knots=options.knots, boundaries=boundaries)
    lesa.save(loaded, options.out)
    config = (next(iter(loaded.values())) if isinstance(loaded, dict) else loaded).config
    branches = f", for {' and '.join(map('.'.join, loaded))}" if isinstance(loaded, dict) else ""
    print(f"{config.num_steps} steps, boundaries {config.boundaries}{branches}: {options.out}")


def _info(options: argparse.Namespace) -> None:
    loaded = lesa.load(options.path)
    if isinstance(loaded, lesa.Calibration):
        print(f"calibration of {loaded.describe()}")
        print(f"streams    {', '.join('.'.join(stream) for stream in loaded.streams)}")
        print(f"plans      {', '.join(map(str, sorted(loaded.plans))) or 'none searched yet'} full steps")
        return
    for stream, forecaster in loaded.items() if isinstance(loaded, dict) else [((), loaded)]:
        if stream:
            print(".".join(stream))
        if isinstance(forecaster, lesa.LesaPredictor):
            _describe(forecaster)


def _describe(predictor: "lesa.LesaPredictor") -> None:
    config = predictor.config
    parameters = sum(p.numel() for p in predictor.parameters())
    print(f"LESA predictor for {config.num_steps} steps, {parameters:,} parameters")
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
