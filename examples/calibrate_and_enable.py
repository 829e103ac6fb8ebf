"""Calibrate the demo model on 8 digits and sample with a fifth of its steps."""

import torch

import lesa
from lesa.demo.model import load_pipeline, request


def main() -> None:
    """Print which steps ran, and how far the images are from the full sampler's."""
    pipeline = load_pipeline()
    calibration = lesa.calibrate(pipeline, [request(range(8), range(100, 108))], search=False)
    call = request(range(10), range(10))
    full = pipeline(**call).images
    with lesa.enable(pipeline, calibration, speedup=5) as handle:
        fast = pipeline(**request(range(10), range(10))).images
    print(handle.summary())
    print(f"root mean squared difference {torch.nn.functional.mse_loss(fast, full).sqrt():.4f}")


if __name__ == "__main__":
    main()
