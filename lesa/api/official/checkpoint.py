"""``load_official``: read the checkpoints of the authors of LESA.

A checkpoint is a ``torch.save`` of ``{"config", "model", "optimizer", "scheduler"}``. ``config`` is an instance of a
class of their package; all tensors are bfloat16, also the knots of the splines. Source: the code released with
https://arxiv.org/abs/2602.20497.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lesa.api.official.archive import Archive
from lesa.api.official.values import StoredTensor, plain
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.tables.forecaster import Stream
from lesa_kernels.ops.kan_linear.reference import uniform_knots

WRAPPERS = {"module", "model", "_orig_mod"}  # prefixes of keys by DDP, a parent module and torch.compile
BRANCHES = ("cond", "uncond")
COMPONENT = "transformer"  # its name in every pipeline of diffusers that they have a checkpoint for
MAX_MESSAGE = 300  # characters; a message may quote the file
BOUNDARIES = (0.9, 0.5)
GUIDED_BOUNDARIES = (0.9, 0.4)  # Qwen-Image, their only model with a predictor for each branch


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The content of a checkpoint.

    Attributes:
        config: the settings, as plain data.
        weights: for each branch of guidance, or ``""`` if there is one predictor, the weights by their names in a
            :class:`LesaPredictor`, in the dtype of the file.
    """

    config: Any
    weights: dict[str, dict[str, Tensor]]


def load_official(
    path: str | Path,
    *,
    knots: Literal["exact", "released"] = "exact",
    boundaries: tuple[float, ...] | None = None,
) -> LesaPredictor | dict[Stream, LesaPredictor]:
    """Read a checkpoint of the authors, for FLUX, Qwen-Image or HunyuanVideo. Nothing in the file is executed.

    Args:
        path: the file.
        knots: ``"exact"`` uses uniform knots. ``"released"`` uses the knots of the file, rounded to bfloat16 (intervals
            of 1.1875 to 1.21875 instead of 1.2); these splines run in plain PyTorch, not in the kernel.
        boundaries: times that separate the stages, which are not in the file; None: those of the paper, (0.9, 0.4) for
            a checkpoint with branches (Qwen-Image), else (0.9, 0.5).

    Returns:
        A float32 predictor; for a checkpoint with branches of guidance a mapping with two predictors, under
        ``("transformer", "cond")`` and ``("transformer", "uncond")``. :func:`lesa.enable` takes both. ``schedule`` is
        None, since the times of the training are not in the file: a wrong schedule is not noticed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds anything but tensors and plain data; the message names it.
    """
    if knots not in ("exact", "released"):
        raise ValueError(f"knots must be 'exact' or 'released', not {knots!r}")
    weights = read_official(path).weights
    if boundaries is None:
        boundaries = GUIDED_BOUNDARIES if "" not in weights else BOUNDARIES
    try:
        made = {branch: _predictor(state, knots, boundaries) for branch, state in weights.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {str(error)[:MAX_MESSAGE]}") from error
    return made[""] if "" in made else {(COMPONENT, branch): made[branch] for branch in BRANCHES}


def read_official(path: str | Path) -> OfficialCheckpoint:
    """The settings and weights of a checkpoint; raises as :func:`load_official`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with Archive(path) as archive:
            content = archive.content()
            if not isinstance(content, dict):
                raise ValueError(f"a checkpoint is a dictionary, this holds a {type(content).__name__}")
            config = plain(content.get("config"))
            stored = _by_branch(content.get("model", content))
            weights = {branch: archive.tensors(tensors) for branch, tensors in stored.items()}
            return OfficialCheckpoint(config, weights)
    except ValueError as error:
        raise ValueError(f"{path} was not opened: {str(error)[:MAX_MESSAGE]}") from error


def _by_branch(model: Any) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by branch and by their names in a :class:`LesaPredictor`."""
    if not isinstance(model, dict):
        raise ValueError(f"the weights of a checkpoint are a dictionary, these are a {type(model).__name__}")
    result: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in model.items():
        part, *rest = [word for word in str(key).split(".") if word not in WRAPPERS] or [""]
        part, _, branch = part.partition("_")
        if part not in ("latent", "timestep") or branch not in ("", *BRANCHES) or not isinstance(tensor, StoredTensor):
            raise ValueError(f"{str(key)[:80]!a} is no weight of a LESA predictor")
        name = ".".join([part, *rest])
        if name in result.setdefault(branch, {}):
            raise ValueError(f"{str(key)[:80]!a} is there twice, under another prefix")
        result[branch][name] = tensor
    if set(result) not in ({""}, set(BRANCHES)):
        raise ValueError(f"it should hold one predictor, or one for cond and one for uncond, not {sorted(result)}")
    return result


def _predictor(weights: dict[str, Tensor], knots: str, boundaries: tuple[float, ...]) -> LesaPredictor:
    config = _config(weights, boundaries)
    with torch.device("meta"):  # no initialisation, whose cost grows with the cube of the number of bases
        predictor = LesaPredictor(config)
    uniform = uniform_knots(config.grid_size, config.spline_order, config.grid_range).float()
    made = {name: tensor.float() for name, tensor in weights.items()}
    for name, given in weights.items():
        if not name.endswith(".grid"):
            continue
        rounding = torch.finfo(given.dtype).eps / 2 * uniform.abs() + 1e-6 * uniform.abs().max()
        # other knots than the rounded uniform ones come from a grid update and belong to their weights
        near = uniform.isfinite() & ((given.float() - uniform).abs() <= rounding)
        if knots == "exact" and bool(near.all()):
            made[name] = uniform.repeat(len(given), 1)
    predictor.load_state_dict(made, assign=True)
    return predictor.eval().requires_grad_(False)


def _config(weights: dict[str, Tensor], boundaries: tuple[float, ...]) -> LesaConfig:
    """The configuration that the shapes of the weights imply, with the range of the grid."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        (_, first_history), (_, history) = shapes["latent.0.weight"], shapes["latent.1.weight"]
        hidden_dim, inputs = shapes["timestep.0.layers.0.base_weight"]
        *_, bases = shapes["timestep.0.layers.0.spline_weight"]
        *_, num_knots = shapes["timestep.0.layers.0.grid"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the weights are not those of a LESA predictor: {error}") from error
    order = num_knots - bases - 1
    if not 0 <= order < bases:
        raise ValueError(f"{bases} bases do not go with {num_knots} knots")
    config = LesaConfig(
        num_steps=inputs - 1,
        hidden_dim=hidden_dim,
        history=history,
        first_history=first_history,
        boundaries=boundaries,
        grid_size=bases - order,
        spline_order=order,
    )
    config.check_shapes(shapes)
    _check_values(weights)
    # the ends of the grid, -3 and 3, are exact in bfloat16
    knots = weights["timestep.0.layers.0.grid"].double()[0]
    return dataclasses.replace(config, grid_range=(float(knots[order]), float(knots[-order - 1])))


def _check_values(weights: dict[str, Tensor]) -> None:
    wrong = {str(t.dtype) for t in weights.values() if t.dtype not in (torch.bfloat16, torch.float16, torch.float32)}
    if wrong:
        raise ValueError(f"its weights are {', '.join(sorted(wrong))}, not bfloat16, float16 or float32")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise ValueError("its weights hold NaN or infinity")
    if not all(bool((grid.double().diff() > 0).all()) for name, grid in weights.items() if name.endswith(".grid")):
        raise ValueError("the knots of a spline do not rise")
