"""The shapes of the models' features that the benchmarks use."""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A feature [batch, tokens, channels], the width of the projection after it, and how a prediction uses it.

    Attributes:
        kept: number of features in the history, the length of LESA's window.
        coming: predicted steps between two full ones, 6 for the paper's N = 7.
    """

    name: str
    batch: int
    tokens: int
    channels: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    kept: int = 8
    coming: int = 6

    @property
    def feature(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.channels

    @property
    def nbytes(self) -> int:
        """Bytes of one feature."""
        return self.batch * self.tokens * self.channels * self.dtype.itemsize

    def within(self, nbytes: float) -> "Shape":
        """This shape with fewer tokens, so that the history takes at most ``nbytes``; the name then has the number."""
        if self.kept * self.nbytes <= nbytes:
            return self
        tokens = max(64, int(self.tokens * nbytes / (self.kept * self.nbytes)) // 64 * 64)
        return dataclasses.replace(self, name=f"{self.name} ({tokens} tokens)", tokens=tokens)


# Numbers of tokens: latents in the model's patches. HunyuanVideo has 17 latent frames at 480 x 640 (65 frames) and 33
# at 720 x 1280 (129 frames), Wan has 21 (81 frames).
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("FLUX.1-dev 1024", 1, 64 * 64, 3072, 64),
        Shape("Qwen-Image 1328", 1, 83 * 83, 3072, 64),
        Shape("HunyuanVideo 480p", 1, 17 * 30 * 40, 3072, 64),
        Shape("HunyuanVideo 720p", 1, 33 * 45 * 80, 3072, 64),
        Shape("Wan 14B 720p", 1, 21 * 45 * 80, 5120, 64),
        Shape("DiT-XL/2 256", 8, 16 * 16, 1152, 32),
        Shape("demo", 256, 16, 96, 4, dtype=torch.float32),
    )
}
SMOKE = Shape(
    "smoke", 1, 96, 64, 16, dtype=torch.float32, kept=4, coming=3
)  # Triton's interpreter has no bf16 products
