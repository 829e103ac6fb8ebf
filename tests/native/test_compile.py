"""torch.compile on a GPU: one graph, no recompilation, the same numbers."""

import pytest
import torch

from tests.native.conftest import call_of


@pytest.mark.parametrize("operation", ["combine", "fused_output_head", "kan_predict", "kan_linear"])
def test_inductor_keeps_the_kernel_in_one_graph(operation):
    call = call_of(operation)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(), call())
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(), call())
