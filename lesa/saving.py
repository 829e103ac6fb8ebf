"""The folder of a predictor: config.json, and weights that repeat it.

The weights say what they are of, so that a folder is readable wherever a saving was interrupted, and so that weights
beside the description of another predictor are noticed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lesa.files import write_tensors, write_text
from lesa.hub import CONFIG_FILE, WEIGHTS_FILE

KIND = "predictor"


def write(directory: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write both files over whatever is there.

    config.json is removed once the new weights are on the disk, the weights take their place, and config.json is
    written anew: there are never weights beside the description of others.

    Raises:
        OSError: that names the file, if one cannot be written.
    """
    write_weights(directory, weights, description, stale=directory / CONFIG_FILE)
    write_text(directory / CONFIG_FILE, json.dumps(description, indent=1) + "\n")


def write_weights(
    directory: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any], *, stale: Path | None = None
) -> None:
    """Write the weights; ``stale`` is removed just before they take the place of those that it describes."""
    more = {"format": "pt", CONFIG_FILE: json.dumps(description)}
    write_tensors(directory / WEIGHTS_FILE, weights, kind=KIND, more=more, stale=stale)


def written(directory: Path) -> dict[str, Any]:
    """What config.json says, or the weights where a saving was interrupted before it was written.

    Raises:
        ValueError: if it is no JSON.
    """
    config = directory / CONFIG_FILE
    if not config.is_file():
        return repeated(directory) or {}
    said: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    return said


def repeated(directory: Path) -> dict[str, Any] | None:
    """What the weights say they are of; None before they did, or if they say nothing that can be understood."""
    try:
        with safe_open(str(directory / WEIGHTS_FILE), "pt") as file:
            said = json.loads((file.metadata() or {}).get(CONFIG_FILE, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None
