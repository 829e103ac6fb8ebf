"""Which implementation runs: ``backend="auto" | "triton" | "torch"``, the same for every function."""

import os
from importlib.util import find_spec

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = find_spec("triton") is not None  # looked up, not imported: importing takes half a second


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the Triton kernel serves this call; ``"auto"`` takes it for CUDA tensors where Triton is installed.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: if ``"triton"`` was asked for where it cannot run.
    """
    if backend == "auto":
        return tensor.is_cuda and HAS_TRITON
    if backend == "torch":
        return False
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    if not HAS_TRITON:
        raise RuntimeError("backend='triton' needs the package triton: pip install 'lesa[triton]'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend='triton' needs tensors on a GPU, these are on {tensor.device}; on a CPU its kernels only run in "
            "Triton's interpreter, which TRITON_INTERPRET=1 chooses before triton is first imported"
        )
    return True
