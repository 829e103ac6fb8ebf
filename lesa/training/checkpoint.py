"""The state of a training and its file: safetensors, with the rest as JSON in the header."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.arguments import real, whole
from lesa.files import TensorFile, check_tensor, read_tensors, write_tensors
from lesa.predictor.predictor import LesaPredictor

KIND = "training checkpoint"
ADVICE = "remove it to start again, or name another file"
SAVE_EVERY_SECONDS = 5.0


@dataclass
class TrainingState:
    """The state of a training that the next update depends on."""

    predictor: LesaPredictor
    optimizer: torch.optim.Optimizer
    losses: dict[str, list[float]]
    batches: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

    def save(self, path: Path, arguments: dict[str, Any], *, only_if_due: bool) -> None:
        """Write it; with ``only_if_due``, at most every few seconds."""
        if only_if_due and time.monotonic() - self._saved_at < SAVE_EVERY_SECONDS:
            return
        tensors = {f"model.{k}": v for k, v in self.predictor.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
        description = {"losses": self.losses, "batches": self.batches, "arguments": arguments}
        write_tensors(path, tensors, description, kind=KIND)
        self._saved_at = time.monotonic()

    def restore(self, path: Path, arguments: dict[str, Any]) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged or belongs to a training with other arguments.
        """
        file = read_tensors(path, kind=KIND, advice=ADVICE)
        try:
            self._restore(file, arguments)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {ADVICE}") from error

    def _restore(self, file: TensorFile, arguments: dict[str, Any]) -> None:
        description = file.description
        if not isinstance(description, dict) or not isinstance(description.get("arguments"), dict):
            raise ValueError("it does not say what training it is of")
        given, known = json.loads(json.dumps(arguments)), description["arguments"]
        other = [name for name in given if known.get(name) != given[name]]
        if other or given.keys() != known.keys():
            raise ValueError(f"it belongs to a training with other arguments ({', '.join(other) or 'not the same'})")
        self.losses = _losses(description.get("losses"), set(self.losses))
        done = sum(map(len, self.losses.values()))  # one loss for each batch
        self.batches = whole("batches", description.get("batches"), least=done, most=done)
        state = self.predictor.state_dict()
        model = {name: _like(file.tensors, f"model.{name}", value) for name, value in state.items()}
        optimizer: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self.predictor.parameters()):
            names = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            keys = {name: f"optimizer.{index}.{name}" for name in names}
            if any(key in file.tensors for key in keys.values()):  # none if it has had no gradient yet
                optimizer[index] = {
                    name: check_tensor(file.tensors, keys[name], tuple(shape), dtypes=(torch.float32,))
                    for name, shape in names.items()
                }
                if any(bool((optimizer[index][name] < 0).any()) for name in ("step", "exp_avg_sq")):
                    raise ValueError(f"optimizer.{index} has steps or squares below zero")
        if len(file.tensors) != len(model) + sum(map(len, optimizer.values())):
            raise ValueError("it holds tensors that are not of this training")
        self.predictor.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})


def _like(tensors: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    return check_tensor(tensors, name, tuple(value.shape), dtypes=(value.dtype,))


def _losses(value: Any, stages: set[str]) -> dict[str, list[float]]:
    if not isinstance(value, dict) or set(value) != stages or not all(isinstance(v, list) for v in value.values()):
        raise ValueError("losses must have a list for each stage")
    return {stage: [real("a loss", loss, least=0) for loss in losses] for stage, losses in value.items()}
