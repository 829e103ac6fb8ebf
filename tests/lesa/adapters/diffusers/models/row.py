"""The constructor arguments and the inputs of one tiny model."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One class of transformer, or another configuration of it.

    Attributes:
        config: arguments of the constructor.
        inputs: arguments of a call at a noise level in (0, 1], in the convention of the class's pipeline. Tensors are
            random at each call; the test sets the seed.
        module: the module of the class, if ``diffusers`` does not export it.
        embedders: modules inside lists that are not part of a block: embedders, which also run on predicted steps.
    """

    config: dict[str, Any]
    inputs: Callable[[float], Inputs]
    module: str = "diffusers"
    embedders: tuple[str, ...] = field(default=())


def build(name: str, row: Row) -> nn.Module:
    """The tiny model of the class at the start of ``name``, with random weights and no parameter that is all zero."""
    cls = getattr(importlib.import_module(row.module), name.split(":")[0])
    model: nn.Module = cls(**row.config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)  # zero at the start of training; such layers would hide errors
    return model


def exists(name: str, row: Row) -> bool:
    """Whether the installed diffusers has the class."""
    try:
        return hasattr(importlib.import_module(row.module), name.split(":")[0])
    except ModuleNotFoundError:
        return False


noise = torch.randn


def thousand(t: float, *shape: int) -> Tensor:
    """The time as in most pipelines: 1000 at pure noise."""
    return torch.full(shape or (1,), 1000.0 * t)


def unit(t: float, *shape: int) -> Tensor:
    """The noise level itself."""
    return torch.full(shape or (1,), t)


def growing(t: float, *shape: int) -> Tensor:
    """The time as 0 at pure noise and 1 at the image."""
    return torch.full(shape or (1,), 1.0 - t)


def prompt_lengths(batch: int, tokens: int) -> Inputs:
    """The argument that Qwen-Image needs besides the mask, up to diffusers 0.36."""
    wanted = "txt_seq_lens" in signature(diffusers.QwenImageTransformer2DModel.forward).parameters
    return {"txt_seq_lens": [tokens] * batch} if wanted else {}
