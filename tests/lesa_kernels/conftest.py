"""The device for kernel tests: the GPU if there is one, else the CPU with Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    from tests.lesa_kernels import interpreter, tracing

    interpreter.repair()
    tracing.leave_out_kernels()
    return torch.device("cpu")
