"""Which implementation runs: ``backend="auto" | "triton" | "native" | "torch"``, the same for every operation.

    triton   the Triton kernels, for tensors on a GPU (and, slowly, in Triton's interpreter)
    native   code for CPUs: tiles that stay in the cache
    torch    the plain reference, anywhere
    auto     triton on a GPU if Triton is installed, native on a CPU, torch elsewhere

A call that the chosen backend does not support (dtype, size, memory layout) runs on the reference.
"""

import os
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

BACKENDS = ("auto", "triton", "native", "torch")
HAS_TRITON = find_spec("triton") is not None  # looked up, not imported: importing takes half a second


def choose_backend(backend: str, tensor: Tensor) -> Literal["triton", "native", "torch"]:
    """The backend of a call.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that cannot run on this tensor.
    """
    if backend == "auto":
        if tensor.is_cuda:
            return "triton" if HAS_TRITON else "torch"
        return "native" if tensor.device.type == "cpu" else "torch"
    if backend == "torch":
        return "torch"
    if backend == "native":
        if tensor.device.type != "cpu":
            raise RuntimeError(f"backend='native' needs tensors on a CPU, these are on {tensor.device}")
        return "native"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    if not HAS_TRITON:
        raise RuntimeError("backend='triton' needs the package triton: pip install 'lesa[triton]'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend='triton' needs tensors on a GPU, these are on {tensor.device}; on a CPU its kernels only run in "
            "Triton's interpreter, which TRITON_INTERPRET=1 chooses before triton is first imported"
        )
    return "triton"
