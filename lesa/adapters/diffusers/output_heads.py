"""The output heads: from the feature that enters the final norm to the output, one entry for each model family.

Where the output head is known, a predicted step runs no forward and no embedder, and the outputs of an interval are
computed in one pass over the kept features. Elsewhere the forward runs and blocks return their inputs.

All known heads are a layer norm without weights of its own, modulated by the time and the condition, and a projection:

    output = unpack((norm(feature) * multiplier + addend) @ weight.T + bias)
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesa.adapters.diffusers.compat import innermost_forward
from lesa.adapters.diffusers.models import look_up
from lesa.statistics.output_errors import LinearHead

Arguments = dict[str, Any]  # of the transformer's forward, by name
Modulation = tuple[Tensor, Tensor]  # multiplier and addend, each [P, B or 1, D]


@dataclass(frozen=True)
class OutputHead:
    """The output head of one family of transformers.

    Attributes:
        modulation: (transformer, arguments, times [P, B or 1] as the model is called with them) -> multiplier, addend.
        unpack: (transformer, arguments, tokens [B, T, O]) -> the output of forward.
        projection: the name of the last linear layer.
        time_unit: what the model is called with at noise level 1, where a scheduler's timestep is 1000.
        fits: whether calls with these arguments use this head; others run the whole forward.
    """

    modulation: Callable[[Any, Arguments, Tensor], Modulation]
    unpack: Callable[[Any, Arguments, Tensor], Tensor]
    projection: str = "proj_out"
    time_unit: int = 1000
    fits: Callable[[Any, Arguments], bool] = lambda transformer, arguments: True


def find_output_head(transformer: nn.Module) -> OutputHead | None:
    """The output head of a transformer, if its class is known and no layer of the head was replaced or wrapped.

    A derived class or an instance may have another ``forward``; then the head is not known. The hooks of accelerate and
    diffusers wrap ``forward`` and do not count as another.
    """
    found = look_up(OUTPUT_HEADS, type(transformer))
    if found is None:
        return None
    name, head = found
    base: Any = next(kind for kind in reversed(type(transformer).__mro__) if kind.__name__ == name)
    if innermost_forward(transformer) is not inspect.unwrap(base.forward):
        return None
    norm = getattr(transformer, "norm_out", None)
    norm = getattr(norm, "norm", norm)  # the adaptive ones hold a plain one
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is None
    return head if plain and type(getattr(transformer, head.projection, None)) is nn.Linear else None


def linear_head(transformer: Any, arguments: Arguments) -> LinearHead | None:
    """The output head of a transformer at a call with these arguments, if it is known."""
    head = find_output_head(transformer)
    if head is None or not head.fits(transformer, arguments):
        return None
    multiplier, _ = head.modulation(transformer, arguments, arguments["timestep"].reshape(1, -1))
    projection = transformer.get_submodule(head.projection)
    return LinearHead(multiplier[0], projection.weight, norm_eps(transformer))


def norm_eps(transformer: Any) -> float:
    """The epsilon of the final norm."""
    norm = transformer.norm_out
    return float(getattr(norm, "norm", norm).eps)


def _embed(projection: nn.Module, embedder: nn.Module, times: Tensor, dtype: torch.dtype) -> Tensor:
    """Time embeddings [*times, D]: sinusoids and a small MLP, once for each distinct entry of times.

    Sinusoids are rounded to ``dtype``, unless it is an integer dtype of quantised weights.
    """
    sinusoids = projection(times.flatten())
    embedded: Tensor = embedder(sinusoids.to(dtype) if dtype.is_floating_point else sinusoids)
    result: Tensor = embedded.unflatten(0, times.shape)
    return result


def _adaptive(transformer: Any, condition: Tensor) -> Modulation:
    """AdaLayerNormContinuous: scale and shift from a linear layer on the condition [P, B or 1, D]."""
    scale, shift = transformer.norm_out.linear(F.silu(condition)).chunk(2, dim=-1)
    return 1 + scale, shift


def _table(transformer: Any, embedded: Tensor) -> Modulation:
    """A learned table of shift and scale [2, D] (or [1, 2, D]) added to the time embedding [P, B or 1, D]."""
    shift, scale = transformer.scale_shift_table.reshape(2, -1).to(embedded.device)
    return 1 + scale + embedded, shift + embedded


def _guided_text(embed: Any, arguments: Arguments, times: Tensor, guidance: Tensor | None) -> Tensor:
    """The sum of the embeddings of time, guidance and pooled prompt, [P, B, D]."""
    pooled = arguments["pooled_projections"]
    condition = _embed(embed.time_proj, embed.timestep_embedder, times, pooled.dtype)
    if guidance is not None:
        condition = condition + _embed(embed.time_proj, embed.guidance_embedder, guidance, pooled.dtype)
    result: Tensor = condition + embed.text_embedder(pooled)
    return result


def _flux(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    dtype, guidance = arguments["hidden_states"].dtype, arguments.get("guidance")
    guidance = None if guidance is None else guidance.to(dtype) * 1000
    return _adaptive(
        transformer, _guided_text(transformer.time_text_embed, arguments, times.to(dtype) * 1000, guidance)
    )


def _qwen_image(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    dtype, embed = arguments["hidden_states"].dtype, transformer.time_text_embed
    return _adaptive(transformer, _embed(embed.time_proj, embed.timestep_embedder, times.to(dtype), dtype))


def _sd3(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    return _adaptive(transformer, _guided_text(transformer.time_text_embed, arguments, times, None))


def _hunyuan_video(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    embed = transformer.time_text_embed
    guidance = None if embed.guidance_embedder is None else arguments["guidance"]
    return _adaptive(transformer, _guided_text(embed, arguments, times, guidance))


def _wan(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    embed = transformer.condition_embedder
    dtype = next(embed.time_embedder.parameters()).dtype
    embedded = _embed(embed.timesteps_proj, embed.time_embedder, times, dtype)
    return _table(transformer, embedded.type_as(arguments["encoder_hidden_states"]))


def _pixart(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    embed = transformer.adaln_single.emb
    dtype = arguments["hidden_states"].dtype
    return _table(transformer, _embed(embed.time_proj, embed.timestep_embedder, times, dtype))


def _dit(transformer: Any, arguments: Arguments, times: Tensor) -> Modulation:
    embed, dtype = transformer.transformer_blocks[0].norm1.emb, arguments["hidden_states"].dtype
    condition = _embed(embed.time_proj, embed.timestep_embedder, times, dtype)
    condition = condition + embed.class_embedder(arguments["class_labels"])
    shift, scale = transformer.proj_out_1(F.silu(condition)).chunk(2, dim=-1)
    return 1 + scale, shift


def _as_tokens(transformer: Any, arguments: Arguments, tokens: Tensor) -> Tensor:
    """FLUX and Qwen-Image return tokens; the pipeline unpacks them."""
    return tokens


def _as_image(transformer: Any, arguments: Arguments, tokens: Tensor) -> Tensor:
    """Tokens [B, H W, p p C] as an image [B, C, H p, W p] of the size of the input."""
    patch = transformer.config.patch_size
    height, width = (size // patch for size in arguments["hidden_states"].shape[-2:])
    image = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    result: Tensor = image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return result


def _as_video(transformer: Any, arguments: Arguments, tokens: Tensor, *, channels_first: bool) -> Tensor:
    """Tokens [B, F H W, ...] as a video [B, C, F, H, W] of the size of the input."""
    config = transformer.config
    patch = (
        config.patch_size if channels_first is False else (config.patch_size_t, config.patch_size, config.patch_size)
    )
    sizes = [size // p for size, p in zip(arguments["hidden_states"].shape[-3:], patch, strict=True)]
    inner = (-1, *patch) if channels_first else (*patch, -1)
    video = tokens.unflatten(2, inner).unflatten(1, sizes)  # [B, F, H, W, then C, pt, p, p or pt, p, p, C]
    order = (0, 4, 1, 5, 2, 6, 3, 7) if channels_first else (0, 7, 1, 4, 2, 5, 3, 6)
    result: Tensor = video.permute(order).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return result


def _hunyuan_video_output(transformer: Any, arguments: Arguments, tokens: Tensor) -> Tensor:
    return _as_video(transformer, arguments, tokens, channels_first=True)


def _wan_output(transformer: Any, arguments: Arguments, tokens: Tensor) -> Tensor:
    return _as_video(transformer, arguments, tokens, channels_first=False)


def _without(*names: str) -> Callable[[Any, Arguments], bool]:
    """Fits calls in which none of these arguments is set (a LoRA scale, an image adapter, ...)."""
    return lambda transformer, arguments: not any(arguments.get(name) for name in names)


OUTPUT_HEADS: dict[str, OutputHead] = {
    "FluxTransformer2DModel": OutputHead(_flux, _as_tokens, time_unit=1, fits=_without("joint_attention_kwargs")),
    "QwenImageTransformer2DModel": OutputHead(
        _qwen_image,
        _as_tokens,
        time_unit=1,
        fits=lambda transformer, arguments: (
            not transformer.config.get("zero_cond_t")  # older releases do not have it
            and not getattr(transformer.time_text_embed, "use_additional_t_cond", False)
            and arguments.get("guidance") is None
            and not arguments.get("attention_kwargs")
        ),
    ),
    "SD3Transformer2DModel": OutputHead(_sd3, _as_image, fits=_without("joint_attention_kwargs")),
    "HunyuanVideoTransformer3DModel": OutputHead(
        _hunyuan_video,
        _hunyuan_video_output,
        fits=lambda transformer, arguments: (
            transformer.config.image_condition_type is None and not arguments.get("attention_kwargs")
        ),
    ),
    "WanTransformer3DModel": OutputHead(
        _wan,
        _wan_output,
        fits=lambda transformer, arguments: arguments["timestep"].ndim == 1 and not arguments.get("attention_kwargs"),
    ),
    "PixArtTransformer2DModel": OutputHead(
        _pixart,
        _as_image,
        fits=lambda transformer, arguments: not transformer.adaln_single.emb.use_additional_conditions,
    ),
    "DiTTransformer2DModel": OutputHead(_dit, _as_image, projection="proj_out_2"),
}
