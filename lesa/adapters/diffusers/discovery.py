"""Where the blocks, the heads and the time of a diffusion transformer are: all model knowledge there is.

A class that follows the rule needs no entry. To add one that does not, add a row to ``LAYOUTS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

# The rule: the head is the first of these that exists, the final norm or, where a model has none, the last projection.
# What enters it is the feature that is predicted. Blocks are the elements of all lists of modules.
HEADS = ("norm_out", "final_norm", "final_layer", "out_layer", "head", "norm_final", "proj_out")
# The argument of forward that holds the time.
TIMES = ("timestep", "timesteps", "t", "vision_timesteps", "decoder_noise_time")
# Other arguments that are new at every step: further latents and times, what a ControlNet makes of them, and caches of
# keys and values that a call of its own fills. All else, but for the first argument and the time, are conditions, by
# which a branch is known.
CHANGING = (
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
class Layout:
    """How one class differs from the rule.

    Attributes:
        heads: their names. Models of video and sound have one for each, and each has features of its own.
        fills_cache: whether a call with these arguments only fills a cache of keys and values inside the blocks; such
            a call is no step and runs as it is.
        refusal: why this class cannot be accelerated.
    """

    heads: tuple[str, ...] = ()
    fills_cache: Callable[[dict[str, Any]], bool] = lambda arguments: False
    refusal: str = ""


LAYOUTS: dict[str, Layout] = {
    "AnyFlowFARTransformer3DModel": Layout(
        fills_cache=lambda arguments: bool((arguments.get("kv_cache_flag") or {}).get("is_cache_step"))
    ),
    "Cosmos3OmniTransformer": Layout(heads=("proj_out", "audio_proj_out", "action_proj_out")),
    "DreamLiteTransformer2DModel": Layout(refusal=PART_OF_UNET),
    "GlmImageTransformer2DModel": Layout(fills_cache=lambda arguments: _mode(arguments.get("kv_caches")) == "write"),
    "Kandinsky6Transformer3DModel": Layout(heads=("out_layer", "audio_out_layer")),
    "LTX2VideoTransformer3DModel": Layout(heads=("norm_out", "audio_norm_out")),
    "MiniMaxMusic3RVQDepthDecoder": Layout(refusal="it is autoregressive and has no denoising steps"),
    "RFD4ProteinaTransformer": Layout(refusal="its output is read out of tokens and pairs in several places"),
    "SanaWMLTX2RefinerTransformer3DModel": Layout(
        fills_cache=lambda arguments: "capture" in (arguments.get("kv_cache_mode") or "")
    ),
    "T5FilmDecoder": Layout(heads=("decoder_norm",)),
    "Transformer2DModel": Layout(refusal=PART_OF_UNET),
    "TransformerTemporalModel": Layout(refusal=PART_OF_UNET),
    "WanAnimate2Transformer3DModel": Layout(fills_cache=lambda arguments: arguments.get("kv_cache_mode") == "extract"),
    "ZImageTransformer2DModel": Layout(heads=("all_final_layer",)),
}


Known = TypeVar("Known")


def look_up(table: Mapping[str, Known], kind: type) -> tuple[str, Known] | None:
    """The entry of a class, or of the nearest class that it was derived from, with the name it is under.

    Users derive classes from those of diffusers, and FSDP2 does so for every model that it shards.
    """
    return next(((base.__name__, table[base.__name__]) for base in kind.__mro__ if base.__name__ in table), None)


def find_layout(transformer: nn.Module) -> Layout:
    """What is known of its class.

    Raises:
        ValueError: if that is why it cannot be accelerated.
    """
    name, layout = look_up(LAYOUTS, type(transformer)) or ("", Layout())
    if layout.refusal:
        raise ValueError(f"{name} cannot be accelerated: {layout.refusal}")
    return layout


def find_heads(transformer: nn.Module) -> dict[str, nn.Module]:
    """The heads by name; the elements of a dictionary of heads are heads.

    Raises:
        ValueError: if there is none under a known name.
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
    """The modules by name, the elements of dictionaries in place of these."""
    for name, module in modules.items():
        if isinstance(module, nn.ModuleDict):
            yield from ((f"{name}.{key}", element) for key, element in module.items())
        else:
            yield name, module


def _mode(caches: Any) -> str | None:
    """What a list of caches is set to do."""
    return None if caches is None else getattr(caches[0], "mode", None)
