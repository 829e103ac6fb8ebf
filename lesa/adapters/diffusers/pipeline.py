"""A pipeline from outside: its transformers, what identifies them, and which pipeline makes a call."""

import hashlib
import json
import sys
from typing import Any

import torch
from torch import nn

from lesa.adapters.diffusers.compat import unwrap_module

DEPTH = 12  # stack frames between a transformer and its pipeline; compiled and offloaded models have about eight


def find_transformers(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or a bare one as ``"transformer"``.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(target, nn.Module):
        return {"transformer": target}
    components = getattr(target, "components", {})
    found = {
        name: module
        for name, module in components.items()
        if name.startswith("transformer") and isinstance(module, nn.Module)
    }
    if not found:
        raise ValueError(f"{type(target).__name__} has no transformer; give a diffusers pipeline or a transformer")
    return found


def describe_model(target: Any) -> dict[str, str]:
    """The class of each transformer of a pipeline and a hash of its configuration, by component.

    Equal for models that can share a calibration. The class is the one that defines ``forward``: a compiled or sharded
    model is still the same model.
    """
    plain = {name: getattr(module, "_orig_mod", module) for name, module in find_transformers(target).items()}
    return {name: f"{_class_of_forward(module)} {_hash(module)}" for name, module in plain.items()}


def _class_of_forward(module: Any) -> str:
    return next(kind.__name__ for kind in type(module).__mro__ if "forward" in vars(kind))


def _hash(module: Any) -> str:
    config = {key: value for key, value in dict(getattr(module, "config", {})).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


def weights_digest(target: Any) -> str | None:
    """Tells models of one configuration apart by a few numbers of each weight; None if some are on ``meta``."""
    digest = hashlib.sha256()
    for component, module in sorted(find_transformers(target).items()):
        for name, parameter in getattr(module, "_orig_mod", module).named_parameters():
            if parameter.is_meta:
                return None
            few = parameter.detach().reshape(-1)[:8].float().cpu() if parameter.is_floating_point() else torch.zeros(0)
            digest.update(f"{component} {name} {list(parameter.shape)} {few.tolist()}".encode())
    return digest.hexdigest()[:16]


def calling_pipeline(component: str, transformer: nn.Module) -> Any:
    """The innermost caller that holds a transformer under this name and a scheduler beside it, or None.

    A server makes a pipeline for each request, with its own scheduler and the models of the pipeline that lesa was
    enabled on. No argument of a model's call tells them apart, so the call stack is read: a few microseconds.
    """
    frame = sys._getframe(1)
    for _ in range(DEPTH):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if not isinstance(owner, nn.Module) and _holds(owner, component, transformer):
                return owner
    return None


def _holds(owner: Any, component: str, transformer: nn.Module) -> bool:
    known = getattr(owner, "__dict__", {})
    held = known.get(component)
    return "scheduler" in known and isinstance(held, nn.Module) and unwrap_module(held) is transformer
