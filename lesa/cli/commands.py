"""What each command does."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import lesa
from lesa.cli.parser import DEMO, make_parser
from lesa.tables.plan import StepPlan


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends with one line on stderr and exit code 2."""
    options = make_parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that are not needed here
    try:
        COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, such as head
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


def demo(options: argparse.Namespace) -> None:
    """Accelerate the demo model and compare."""
    from lesa.demo.run import run_demo

    run_demo(options.out, held_out=options.held_out, timing_rounds=options.rounds)


def calibrate(options: argparse.Namespace) -> None:
    """Measure once what plans and forecasters for any budget need."""
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


def plan(options: argparse.Namespace) -> None:
    """Show the best plan for a budget, or the predicted error for every number of full steps."""
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


def evaluate(options: argparse.Namespace) -> None:
    """Compare forecasters and plans with the full sampler."""
    from rich.console import Console

    from lesa.adapters.diffusers.pipeline import describe_model
    from lesa.cli.methods_by_name import default_plans, grid
    from lesa.evaluation.pictures import draw
    from lesa.reports.columns import console_table

    calibration = None if options.calibration is None else lesa.Calibration.load(options.calibration)
    methods = grid(options.forecasters, options.plans or default_plans(options.steps, calibration), calibration)
    pipeline, calls, keywords = _pipeline_and_calls(options, held_out=True)
    if calibration is not None:
        calibration.check_model(describe_model(pipeline))
    rows = lesa.evaluate(
        pipeline,
        methods,
        calls,
        seed=options.seed,
        metrics=options.metrics,
        rounds=options.rounds,
        out=options.out,
        **keywords,
    )
    draw(options.out, rows)
    Console().print(console_table(rows, title=f"{rows[0]['samples']} samples against the full sampler"))
    print(f"evaluation.json and pictures: {options.out}")


def _pipeline_and_calls(
    options: argparse.Namespace, *, held_out: bool = False
) -> tuple[Any, list[Any], dict[str, Any]]:
    """What to sample with, the calls to make, and keyword arguments of each."""
    if options.model == DEMO:
        from lesa.demo.model import call_of, images_of, load_pipeline
        from lesa.demo.run import CALIBRATION_SEEDS, HELD_OUT_SEEDS

        if held_out:
            return load_pipeline(), [call_of(HELD_OUT_SEEDS[:256], options.steps)], {"images": images_of}
        return load_pipeline(), [call_of(CALIBRATION_SEEDS, options.steps)], {}
    keywords = {"num_inference_steps": options.steps} | ({"output_type": "pt"} if held_out else {})
    prompts = _read_prompts(options.prompts)  # first, since a model takes a while
    return load_model(options.model), prompts, keywords


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        raise ValueError("say what to sample: --prompts FILE, one prompt a line")
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"there is no prompt in {path}")
    return prompts


def fit(options: argparse.Namespace) -> None:
    """Train a LESA predictor for a pipeline, one for each stream."""
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
        load_model(options.model),
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


def load_model(model: str) -> Any:
    """A diffusers pipeline, in bfloat16 on the GPU if there is one."""
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


def convert(options: argparse.Namespace) -> None:
    """Turn a checkpoint of the authors of LESA into safetensors."""
    boundaries = None if options.boundaries is None else tuple(options.boundaries)
    loaded = lesa.load_official(options.checkpoint, knots=options.knots, boundaries=boundaries)
    lesa.save(loaded, options.out)
    config = (next(iter(loaded.values())) if isinstance(loaded, dict) else loaded).config
    branches = f", for {' and '.join(map('.'.join, loaded))}" if isinstance(loaded, dict) else ""
    print(f"{config.num_steps} steps, boundaries {config.boundaries}{branches}: {options.out}")


def info(options: argparse.Namespace) -> None:
    """Describe a predictor or a calibration."""
    from lesa.predictor.model_card import facts

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
            print(f"LESA predictor for {forecaster.config.num_steps} steps")
            for name, value in facts(forecaster.describe(), sum(p.numel() for p in forecaster.parameters())):
                print(f"{name:22}{value}")


COMMANDS = {
    "demo": demo,
    "calibrate": calibrate,
    "plan": plan,
    "evaluate": evaluate,
    "fit": fit,
    "convert": convert,
    "info": info,
}
