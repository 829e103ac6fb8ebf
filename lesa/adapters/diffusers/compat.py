"""Every private name of diffusers that this library touches, and nothing else."""

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

__all__ = [
    "HookRegistry",
    "ModelHook",
    "StateManager",
    "active_cache",
    "context_name",
    "refresh_hooks",
    "unwrap_module",
]


def context_name(manager: StateManager) -> str | None:
    """The name given to ``transformer.cache_context(name)`` for the current call, if the pipeline does so."""
    context = getattr(manager, "_context", None)
    return None if context is None else context.name


def refresh_hooks(module: nn.Module) -> None:
    """Hooks were added to or removed from submodules: let the registry look for them again."""
    HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()


def active_cache(module: nn.Module) -> Any | None:
    """The configuration of a cache of diffusers' own that is enabled on this module."""
    return getattr(module, "_cache_config", None) if getattr(module, "is_cache_enabled", False) else None
