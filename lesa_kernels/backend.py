"""Which implementation runs: ``backend="auto" | "triton" | "torch"``, the same for every function."""

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the Triton kernel serves this call.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: if ``"triton"`` was asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    if backend == "triton":
        raise RuntimeError("backend='triton': this version has no Triton kernels yet; use backend='torch' or 'auto'")
    return False
