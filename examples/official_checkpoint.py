"""A checkpoint in the format of the released LESA code is read without running it, converted, and sampled with.

The file is made here of a predictor of the demo, as the released code saves it: in bfloat16, beside an instance of a
class that exists nowhere else.
"""

import dataclasses
import os
import pickle
import sys
import tempfile
import types
from pathlib import Path

import torch

import lesa
from lesa.cli.commands import main
from lesa.demo.model import WEIGHTS, load_pipeline, sample


def save_as_released(predictor, path):
    """``torch.save`` of settings and weights, with the class of the settings gone afterwards."""
    package = types.ModuleType("released_package")
    sys.modules[package.__name__] = package
    package.Config = dataclasses.make_dataclass("Config", ["hidden_dim", "history_depth"])
    package.Config.__module__ = package.__name__
    weights = {f"module.{name}": value.bfloat16() for name, value in predictor.state_dict().items()}
    torch.save({"config": package.Config(predictor.config.hidden_dim, 8), "model": weights}, path)
    del sys.modules[package.__name__]


class Hostile:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, ("echo this must not be printed",)


pipeline = load_pipeline()
plan = lesa.StepPlan.paper(50, interval=5)
ours = lesa.LesaPredictor.from_pretrained(WEIGHTS / "lesa-n5")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "released.pt"
    save_as_released(ours, path)
    images = {}
    for name, predictor in {
        "as it was fitted": ours,
        "from the file": lesa.load_official(path),
        "from the file, with its rounded knots": lesa.load_official(path, knots="released"),
    }.items():
        with lesa.enable(pipeline, predictor, plan):
            images[name] = sample(pipeline, labels=[3], seeds=[0])
        print(f"{name}: {(images[name] - images['as it was fitted']).abs().max():.1e} from the first")

    main(["convert", str(path), str(Path(folder) / "converted")])
    with lesa.enable(pipeline, Path(folder) / "converted", plan) as handle:
        sample(pipeline, labels=[3], seeds=[0])
        print(handle.summary())

    torch.save({"model": {}, "config": Hostile()}, path, pickle_module=pickle)
    try:
        lesa.load_official(path)
    except ValueError as refusal:
        print(f"\nRefused: {refusal}")
