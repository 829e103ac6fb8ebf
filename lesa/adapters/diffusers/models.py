"""Where the blocks, the heads and the time of a transformer are: a rule, and a table of the classes that differ.

A class that follows the rule needs no entry. To add one that does not, add a row to ``MODEL_LAYOUTS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

# The rule: the head is the first of these that exists, the final norm or, where a model has none, the last projection.
# Its input is the feature that is predicted. Blocks are the elements of all lists of modules.
HEADS = ("norm_out", "final_norm", "final_layer", "out_layer", "head", "norm_final", "proj_out")
# The argument of forward that holds the time.
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "vision_timesteps", "decoder_noise_time")
# Other arguments that are new at every step: further latents and times, the output of a ControlNet, and caches of keys
# and values. All other arguments, except the first one and the time, are conditions: they tell branches apart.
STEP_ARGUMENTS = (
    "r_timestep",
    "timestep_r",
    "target_timestep",
    "audio_timestep",
    "sound_timesteps",
    "action_timesteps",
    "sigma",
    "audio_sigma",
    "audio_hidden_states",
    "vision_tokens",
    "sound_tokens",
    "action_tokens",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "kv_cache",
    "kv_caches",
)

PART_OF_UNET = "it is a part of a UNet, whose other parts would run at every step"


@dataclass(frozen=True)
class ModelLayout:
    """How one class differs from the rule.

    Attributes:
        heads: their names. A model of video and sound has two, each with features of its own.
        fills_cache: whether a call with these arguments only fills a cache of keys and values inside the blocks. Such
            a call is no step and runs unchanged.
        refusal: why this class cannot be accelerated.
    """

    heads: tuple[str, ...] = ()
    fills_cache: Callable[[dict[str, Any]], bool] = lambda arguments: False
    refusal: str = ""


MODEL_LAYOUTS: dict[str, ModelLayout] = {
    "AnyFlowFARTransformer3DModel": ModelLayout(
        fills_cache=lambda arguments: bool((arguments.get("kv_cache_flag") or {}).get("is_cache_step"))
    ),
    "Cosmos3OmniTransformer": ModelLayout(heads=("proj_out", "audio_proj_out", "action_proj_out")),
    "DreamLiteTransformer2DModel": ModelLayout(refusal=PART_OF_UNET),
    "GlmImageTransformer2DModel": ModelLayout(
        fills_cache=lambda arguments: _mode(arguments.get("kv_caches")) == "write"
    ),
    "Kandinsky6Transformer3DModel": ModelLayout(heads=("out_layer", "audio_out_layer")),
    "LTX2VideoTransformer3DModel": ModelLayout(heads=("norm_out", "audio_norm_out")),
    "MiniMaxMusic3RVQDepthDecoder": ModelLayout(refusal="it is autoregressive and has no denoising steps"),
    "RFD4ProteinaTransformer": ModelLayout(refusal="its output is read out of tokens and pairs in several places"),
    "SanaWMLTX2RefinerTransformer3DModel": ModelLayout(
        fills_cache=lambda arguments: "capture" in (arguments.get("kv_cache_mode") or "")
    ),
    "T5FilmDecoder": ModelLayout(heads=("decoder_norm",)),
    "Transformer2DModel": ModelLayout(refusal=PART_OF_UNET),
    "TransformerTemporalModel": ModelLayout(refusal=PART_OF_UNET),
    "WanAnimate2Transformer3DModel": ModelLayout(
        fills_cache=lambda arguments: arguments.get("kv_cache_mode") == "extract"
    ),
    "ZImageTransformer2DModel": ModelLayout(heads=("all_final_layer",)),
}


Known = TypeVar("Known")


def look_up(table: Mapping[str, Known], kind: type) -> tuple[str, Known] | None:
    """The entry of a class or of its nearest known base class, with the name of that class.

    Users derive classes from those of diffusers, and so does FSDP2 for every model that it shards.
    """
    return next(((base.__name__, table[base.__name__]) for base in kind.__mro__ if base.__name__ in table), None)


def find_layout(transformer: nn.Module) -> ModelLayout:
    """The layout of its class.

    Raises:
        ValueError: if this class cannot be accelerated; it says why.
    """
    name, layout = look_up(MODEL_LAYOUTS, type(transformer)) or ("", ModelLayout())
    if layout.refusal:
        raise ValueError(f"{name} cannot be accelerated: {layout.refusal}")
    return layout


def find_heads(transformer: nn.Module) -> dict[str, nn.Module]:
    """The heads by name; the elements of a dictionary of heads are heads.

    Raises:
        ValueError: if none of the known names exists.
    """
    names = find_layout(transformer).heads or [name for name in HEADS if _has(transformer, name)][:1]
    heads = dict(_leaves({name: getattr(transformer, name) for name in names if _has(transformer, name)}))
    if not heads:
        raise ValueError(
            f"{type(transformer).__name__} has no final norm under a known name ({', '.join(HEADS)}); "
            "lesa.enable_module takes any module whose blocks and head you name"
        )
    return heads


def find_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Every block of every list of blocks, also of lists in a dictionary.

    Raises:
        ValueError: if there is no such list.
    """
    children = dict(_leaves(dict(transformer.named_children())))
    blocks = [block for child in children.values() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise ValueError(
            f"{type(transformer).__name__} has no list of blocks to skip; "
            "lesa.enable_module takes any module whose blocks and head you name"
        )
    return blocks


def _has(transformer: nn.Module, name: str) -> bool:
    return isinstance(getattr(transformer, name, None), nn.Module)


def _leaves(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, with the elements of each dictionary in its place."""
    for name, module in modules.items():
        if isinstance(module, nn.ModuleDict):
            yield from ((f"{name}.{key}", element) for key, element in module.items())
        else:
            yield name, module


def _mode(caches: Any) -> str | None:
    """The mode of a list of caches."""
    return None if caches is None else getattr(caches[0], "mode", None)
