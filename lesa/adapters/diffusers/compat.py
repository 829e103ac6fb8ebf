"""Every private name of diffusers that this library touches, and nothing else."""

import inspect
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

__all__ = [
    "CacheContextHook",
    "CacheContexts",
    "HookRegistry",
    "ModelHook",
    "active_cache",
    "can_bypass_forward",
    "innermost_forward",
    "is_split",
    "refresh_hooks",
    "refuse_caches",
    "unwrap_module",
]


# The modules of diffusers whose hooks are caches.
CACHES = {
    f"diffusers.hooks.{name}"
    for name in (
        "faster_cache",
        "first_block_cache",
        "mag_cache",
        "pyramid_attention_broadcast",
        "sea_cache",
        "taylorseer_cache",
    )
}

CONTEXT_PARALLEL = "diffusers.hooks.context_parallel"


class CacheContexts(StateManager):
    """The name given to ``transformer.cache_context(name)`` for the current call, for each thread its own.

    diffusers sets it on every attribute of a stateful hook that is a ``StateManager``.
    """

    def __init__(self) -> None:
        self._set = threading.local()
        super().__init__(object)

    def set_context(self, context: Any) -> None:
        self._set.context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._set.context = None

    @property
    def name(self) -> str | None:
        """The context of this thread; None: the pipeline names none."""
        context: Any = getattr(self._set, "context", None)
        name: str | None = getattr(context, "name", context)  # up to 0.40 the name itself
        return name


class CacheContextHook(ModelHook):
    """Changes nothing. diffusers tells it the current cache context and the end of each pipeline call.

    Args:
        manager: receives the context.
        reset: is called at the end.
    """

    _is_stateful = True

    def __init__(self, manager: CacheContexts, reset: Callable[[], None]) -> None:
        super().__init__()
        self.manager = manager  # cache_context() finds it among the attributes of stateful hooks
        self.reset = reset

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.reset()
        return module


def refresh_hooks(module: nn.Module) -> None:
    """Hooks were added to or removed from submodules: clear the registry's cache of them."""
    registry: Any = HookRegistry.check_if_exists_or_initialize(module)
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()
    else:  # up to 0.40; up to 0.37 it looks every time
        registry._child_registries_cache = None


def innermost_forward(module: Any) -> Any:
    """The function behind ``module.forward``, which hooks of diffusers and accelerate may wrap."""
    forward = inspect.unwrap(module.forward)
    if getattr(forward, "__module__", "") == HookRegistry.__module__:  # up to 0.40 its hooks hide what they wrap
        first = module._diffusers_hook._fn_refs[0]
        forward = inspect.unwrap(first.original_forward or first.forward)
    return getattr(forward, "__func__", forward)


def refuse_caches(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Refuse to work beside another cache.

    Args:
        module: the transformer.
        parts: the modules inside it.

    Raises:
        ValueError: if one is enabled on the module.
    """
    cache = active_cache(module, parts)
    if cache is not None:
        raise ValueError(
            f"another cache is enabled on this transformer ({cache}); two caches would undo each other: call "
            "transformer.disable_cache() (or cache_dit.disable_cache(pipeline)), or lesa.disable(...)"
        )


def active_cache(module: nn.Module, parts: Iterable[nn.Module]) -> str | None:
    """The name of a cache that is enabled: by ``enable_cache``, by the functions of diffusers, or by cache-dit."""
    if getattr(module, "is_cache_enabled", False):
        return type(getattr(module, "_cache_config", None)).__name__
    if getattr(module, "_is_cached", False):
        return "cache-dit"
    found = (type(hook) for part in parts for hook in _hooks(part))
    return next((kind.__name__ for kind in found if kind.__module__ in CACHES), None)


def _hooks(part: nn.Module) -> Collection[ModelHook]:
    registry = part.__dict__.get("_diffusers_hook")
    hooks: Collection[ModelHook] = () if registry is None else registry.hooks.values()
    return hooks


def is_split(parts: Iterable[nn.Module]) -> bool:
    """Whether context parallelism (``transformer.enable_parallelism``) leaves each process some of the tokens."""
    return any(type(hook).__module__ == CONTEXT_PARALLEL for part in parts for hook in _hooks(part))


def can_bypass_forward(layer: Any, latents: Tensor, arguments: Iterable[Any]) -> bool:
    """Whether the weight of a linear layer can be used without calling the layer.

    Not if it is offloaded, stored in another dtype (layerwise casting), quantised or under autocast; if hooks on the
    layer do more, such as gathering split tokens or moving weights; or if arguments are on another device.
    """
    weight, device = layer.weight, latents.device
    return (
        not torch.is_autocast_enabled(device.type)  # under which the output has another dtype than the weight
        and type(weight) is nn.Parameter
        and weight.device == device
        and weight.dtype == latents.dtype
        and "_hf_hook" not in vars(layer)
        and not _hooks(layer)
        and all(value.device == device for value in arguments if isinstance(value, Tensor))
    )
