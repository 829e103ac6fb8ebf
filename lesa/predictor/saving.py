"""The folder of a predictor: config.json, and weights whose header repeats it.

The header says what the weights belong to. So a folder stays readable if saving was interrupted, and weights beside the
description of another predictor are noticed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lesa.files import check_tensor, read_tensors, write_tensors, write_text
from lesa.files.hub import CONFIG_FILE, WEIGHTS_FILE
from lesa.files.tensors import FLOATS, SHOWN, damaged
from lesa.predictor.config import LesaConfig
from lesa.predictor.description import UNUSABLE, Description

KIND = "predictor"


def write(directory: Path, weights: Mapping[str, Tensor], description: Description) -> None:
    """Write both files over whatever is there; weights never stand beside the description of others.

    The new weights are written to the disk, the old config.json is removed, the weights take their place, and
    config.json is written.

    Raises:
        OSError: that names the file, if one cannot be written; the old predictor or the new one can be read then.
    """
    _write_weights(directory, weights, description, stale=directory / CONFIG_FILE)
    write_text(directory / CONFIG_FILE, json.dumps(description.to_json(), indent=1) + "\n")


def read(directory: Path) -> tuple[Description, dict[str, Tensor]]:
    """Description and weights of a folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or the weights belong to another configuration or predictor.
    """
    header = _header(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file() and not (name == CONFIG_FILE and header):
            raise FileNotFoundError(
                f"{directory} holds no LESA predictor: {name} is missing; lesa.load reads folders with a predictor "
                "for each branch"
            )
    config = directory / CONFIG_FILE
    try:
        said: Any = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else header
        description = Description.from_json(said)
    except UNUSABLE as error:
        what = f"{config} does not describe a LESA predictor"
        raise ValueError(f"{what}: {f'{type(error).__name__} {error}'[:SHOWN]}") from error
    weights = _read_weights(directory / WEIGHTS_FILE, description.config)
    if header is not None:
        _check_pair(directory, description, said, header)
    return description, weights


def _write_weights(
    directory: Path, weights: Mapping[str, Tensor], description: Description, *, stale: Path | None = None
) -> None:
    """Write the weights; ``stale`` is removed just before they replace those that it describes."""
    more = {"format": "pt", CONFIG_FILE: json.dumps(description.to_json())}
    write_tensors(directory / WEIGHTS_FILE, weights, kind=KIND, more=more, stale=stale)


def _header(directory: Path) -> dict[str, Any] | None:
    """What the weights say they belong to; None if they cannot be read, which :func:`read_tensors` explains."""
    try:
        with safe_open(str(directory / WEIGHTS_FILE), "pt") as file:
            said = json.loads((file.metadata() or {}).get(CONFIG_FILE, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _check_pair(directory: Path, description: Description, said: Any, header: Any) -> None:
    """Refuse a config.json that describes another predictor than the header of the weights does."""
    try:
        other = Description.from_json(header)
    except UNUSABLE as error:
        path = directory / WEIGHTS_FILE
        raise ValueError(damaged(path, KIND, f"{type(error).__name__} {error}")) from error
    if differing := description.differences(other, said.keys()):
        raise ValueError(
            f"{directory / CONFIG_FILE} has another {' and '.join(differing)} than the predictor whose weights are in "
            f"{WEIGHTS_FILE}; save it again, or remove {CONFIG_FILE} to go by what the weights say"
        )


def _read_weights(path: Path, config: LesaConfig) -> dict[str, Tensor]:
    """The weights in a file; their shapes are checked against the configuration before any is read."""
    try:
        with safe_open(str(path), "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
            scale = shapes.pop("scale", None) if config.latent == "kan" else None
            config.check_shapes(shapes)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {str(error)[:SHOWN]}") from error
    except ValueError as error:
        raise ValueError(f"the weights in {path} belong to another configuration: {str(error)[:SHOWN]}") from error
    weights = read_tensors(path, kind=KIND).tensors
    try:
        dtype = check_tensor(weights, "latent.0.weight", shapes["latent.0.weight"], dtypes=FLOATS).dtype
        for name, shape in {**shapes, **({} if scale is None else {"scale": scale})}.items():
            check_tensor(weights, name, shape, dtypes=(dtype,) if not name.endswith(".grid") else FLOATS)
            if name.endswith(".grid") and not bool((weights[name].diff() > 0).all()):
                raise ValueError(f"the knots of {name} do not rise")
    except ValueError as error:
        raise ValueError(damaged(path, KIND, error)) from error
    return weights
