"""The state of a training and its file: safetensors, with the rest as JSON in the header."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.predictor import LesaPredictor

SAVE_EVERY_SECONDS = 5.0


@dataclass
class Progress:
    """How far a training is."""

    predictor: LesaPredictor
    optimizer: torch.optim.Optimizer
    losses: dict[str, list[float]]
    batches: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

    def save(self, path: Path, arguments: dict[str, Any], *, only_if_due: bool) -> None:
        """Write everything that the next update depends on; a file that exists is a whole one."""
        if only_if_due and time.monotonic() - self._saved_at < SAVE_EVERY_SECONDS:
            return
        tensors = {f"model.{k}": v for k, v in self.predictor.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
        metadata = {"losses": json.dumps(self.losses), "batches": str(self.batches), "arguments": json.dumps(arguments)}
        unfinished = path.with_suffix(".unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(unfinished), metadata)
        unfinished.replace(path)
        self._saved_at = time.monotonic()

    def restore(self, path: Path, arguments: dict[str, Any]) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged or belongs to a training with other arguments.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = {key: json.loads(value) for key, value in file.metadata().items()}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a complete training checkpoint ({error}); remove it to start anew"
            ) from error
        if metadata["arguments"] != json.loads(json.dumps(arguments)):
            raise ValueError(f"{path} belongs to a training with other arguments; remove it or name another file")
        self.losses, self.batches = metadata["losses"], metadata["batches"]
        self.predictor.load_state_dict(
            {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value.clone()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
