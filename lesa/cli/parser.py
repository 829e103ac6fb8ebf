"""The commands of ``lesa`` and their arguments."""

import argparse
from pathlib import Path

import lesa

DEMO = "demo"  # in place of a model: the one that ships with the package


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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``options.command`` is the name of the command."""
    parser = argparse.ArgumentParser(prog="lesa", description=(lesa.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lesa {lesa.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="accelerate a small FLUX on handwritten digits and compare")
    demo.add_argument(
        "--out", type=_folder, default=Path("out"), help="folder for the report and pictures (%(default)s)"
    )
    demo.add_argument("--held-out", type=_count, default=512, metavar="N", help="digits to compare on (%(default)s)")
    demo.add_argument("--rounds", type=_natural, default=5, metavar="N", help="timing rounds (%(default)s)")

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("model", help=f"a folder or hub id of a diffusers pipeline, or {DEMO!r}")
    sampling.add_argument("--out", type=_folder, required=True, help="folder for what the command writes")
    sampling.add_argument("--prompts", type=_file, help="a text file, one prompt a line")
    sampling.add_argument("--steps", type=_count, default=50, help="denoising steps (%(default)s)")

    calibrate = commands.add_parser(
        "calibrate",
        parents=[sampling],
        help="measure once what plans and forecasters for any budget need; 4 to 16 prompts",
    )
    calibrate.add_argument("--tokens", type=_count, default=1024, help="of each feature that count (%(default)s)")
    calibrate.add_argument(
        "--refine", type=_count, nargs="+", metavar="N", help="try several plans of so many full steps on the prompts"
    )
    calibrate.add_argument("--seed", type=int, default=0, help="(%(default)s)")

    plan = commands.add_parser("plan", help="the best full steps for a budget, from a calibration")
    plan.add_argument("calibration", type=Path, help="a folder written by lesa calibrate")
    budget = plan.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_count, metavar="N", help="so many full steps")
    budget.add_argument("--speedup", type=float, metavar="X", help="at least so many times fewer full steps")
    budget.add_argument("--max-error", type=float, metavar="E", help="the fewest that keep this predicted error")

    evaluate = commands.add_parser(
        "evaluate", parents=[sampling], help="compare forecasters and plans on prompts that no calibration has seen"
    )
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
    evaluate.add_argument("--rounds", type=_count, default=1, metavar="N", help="timing rounds (%(default)s)")
    evaluate.add_argument("--metrics", nargs="+", metavar="NAME", help="psnr, ssim, lpips, ... (all that can be had)")
    evaluate.add_argument("--seed", type=int, default=1000, help="(%(default)s)")

    fit = commands.add_parser("fit", parents=[sampling], help="train a LESA predictor for a diffusers pipeline")
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

    convert = commands.add_parser("convert", help="turn a checkpoint of the authors of LESA into safetensors")
    convert.add_argument("checkpoint", type=Path, help="their file; nothing in it is executed")
    convert.add_argument("out", type=Path, help="folder for the predictor, or for a folder for each branch of guidance")
    convert.add_argument(
        "--knots", choices=("exact", "released"), default="exact", help="released: rounded to bfloat16 as in the file"
    )
    convert.add_argument(
        "--boundaries", type=float, nargs="*", help="times that separate the stages (0.9 0.5, with branches 0.9 0.4)"
    )

    info = commands.add_parser("info", help="describe a predictor or a calibration")
    info.add_argument("path", type=Path, help="a folder written by lesa fit, lesa calibrate or lesa convert")
    return parser
