"""What all launches of Triton kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

VECTOR_BYTES = 16  # the widest access of a thread
# 8 programs of 128 threads on each of the 132 multiprocessors of an H100 or H200: half of its threads.
FULL_GPU = 8 * 132


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """The GPU of a tensor as the current one; nothing on a CPU, where the interpreter runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def steps_of_program(blocks: int, most: int) -> int:
    """How many of ``blocks`` a program of a reduction takes in turn: as few as still fill the GPU, at most ``most``.

    It follows from the number of blocks alone, so that equal calls add in the same order on any GPU.
    """
    return max(1, min(most, blocks // FULL_GPU))


def vector_size(*tensors: Tensor | None, counts: tuple[int, ...]) -> int:
    """Elements of one access: those of 16 bytes if all tensors and all ``counts`` are aligned to them, else 1.

    ``counts`` are lengths and strides in elements; the first tensor has the dtype.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    vector = VECTOR_BYTES // given[0].element_size()
    aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in given)
    return vector if aligned and all(count % vector == 0 for count in counts) else 1
