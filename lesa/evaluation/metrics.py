"""Metrics of images.

PSNR, SSIM and LPIPS compare with the full sampler's image of the same seed; CLIP score rates an image by its prompt. A
metric that needs weights is available if these are on the machine: nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lesa.evaluation.images import as_frames

GAUSSIAN = 11  # width of SSIM's usual window, pixels
CLIP_MODEL: Final = "openai/clip-vit-large-patch14"
ALEXNET = "alexnet-owt-7be5be79.pth"  # the network of LPIPS

Call = Mapping[str, Any]  # the keyword arguments that the images were asked for with
Measure = Callable[[Tensor, Tensor, Call], Tensor]
NOTHING: Call = {}


@dataclass(frozen=True)
class Metric:
    """One metric of images or videos in [0, 1].

    Attributes:
        name: its key in a row.
        measure: (images, the full sampler's, the call's arguments) -> [N].
        missing: what is missing on this machine, and how to get it; None: nothing.
        needs_prompts: whether it is skipped for calls without a ``prompt``.
    """

    name: str
    measure: Measure
    missing: Callable[[], str | None] = lambda: None
    needs_prompts: bool = False


def psnr(images: Tensor, reference: Tensor, call: Call = NOTHING) -> Tensor:
    """Peak signal to noise ratio in dB of each image; infinite for equal ones."""
    return peak_signal_noise_ratio(
        images.clamp(0, 1), reference.clamp(0, 1), data_range=1.0, dim=tuple(range(1, images.ndim)), reduction="none"
    )


def ssim(images: Tensor, reference: Tensor, call: Call = NOTHING) -> Tensor:
    """Structural similarity. Images smaller than the usual window get the largest uniform window that fits."""
    (frames, count), (true, _) = as_frames(images.clamp(0, 1)), as_frames(reference.clamp(0, 1))
    size = min(frames.shape[-2:])
    small: dict[str, Any] = {} if size > GAUSSIAN else {"gaussian_kernel": False, "kernel_size": size - (size + 1) % 2}
    made: Any = structural_similarity_index_measure(frames, true, data_range=1.0, reduction="none", **small)
    return torch.as_tensor(made).reshape(-1, count).mean(1)


def lpips(images: Tensor, reference: Tensor, call: Call = NOTHING) -> Tensor:
    """Learned perceptual distance through AlexNet, mean over frames (https://arxiv.org/abs/1801.03924)."""
    (frames, count), (true, _) = as_frames(images.clamp(0, 1)), as_frames(reference.clamp(0, 1))
    distance = torch.stack([_lpips()(a[None], b[None]) for a, b in zip(frames, true, strict=True)])
    return distance.reshape(-1, count).mean(1)


def clip_score(images: Tensor, reference: Tensor, call: Call = NOTHING) -> Tensor:
    """100 times the cosine of image and prompt in CLIP, at least 0 (https://arxiv.org/abs/2104.08718)."""
    frames, count = as_frames(images.clamp(0, 1))
    texts = _texts(call, len(frames))
    bytes_ = (frames * 255).round().to(torch.uint8)
    scores = torch.stack([_clip()(image, text).detach() for image, text in zip(bytes_, texts, strict=True)])
    return scores.reshape(-1, count).mean(1)


def _texts(call: Call, frames: int) -> list[str]:
    """The prompt of each frame."""
    prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
    return [prompt for prompt in prompts for _ in range(frames // len(prompts))]


@cache
def _lpips() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


@cache
def _clip() -> Any:
    from torchmetrics.multimodal.clip_score import CLIPScore

    return CLIPScore(CLIP_MODEL)


LOADED = (_lpips, _clip)


@contextmanager
def scoring_models() -> Iterator[None]:
    """Inside, models of metrics are loaded once; they are freed at the end."""
    try:
        yield
    finally:
        for model in LOADED:
            model.cache_clear()


def _without_package(name: str, install: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed: pip install {install}"


def _without_lpips() -> str | None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    absent = f"{path} is not there: torchvision.models.alexnet(weights='DEFAULT') fetches it"
    return _without_package("torchvision", "torchvision") or (None if path.exists() else absent)


def _without_clip() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    here = Path(CLIP_MODEL).is_dir() or isinstance(try_to_load_from_cache(CLIP_MODEL, "config.json"), str)
    absent = f"{CLIP_MODEL} is not in the cache: hf download {CLIP_MODEL} fetches it"
    return _without_package("transformers", "transformers") or (None if here else absent)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", psnr),
        Metric("ssim", ssim),
        Metric("lpips", lpips, _without_lpips),
        Metric("clip_score", clip_score, _without_clip, needs_prompts=True),
    )
}


def choose_metrics(wanted: Sequence[str | Metric] | None = None) -> list[Metric]:
    """Metrics by name, or as they are; None: all that are available on this machine.

    Raises:
        ValueError: for an unknown name, or a metric that is not available.
    """
    if wanted is None:
        return [metric for metric in METRICS.values() if metric.missing() is None]
    unknown = [name for name in wanted if isinstance(name, str) and name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
    chosen = [METRICS[metric] if isinstance(metric, str) else metric for metric in wanted]
    for metric in chosen:
        if (lacks := metric.missing()) is not None:
            raise ValueError(f"{metric.name} cannot be measured here: {lacks}")
    return chosen
