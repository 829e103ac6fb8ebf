"""``KANLinear`` beside other libraries: same weights, same outputs and gradients."""

import pytest
import torch

from benchmarks.peers.efficient_kan import EfficientKANLinear
from lesa_kernels import KANLinear


def test_state_dicts_load_in_both_directions():
    theirs = EfficientKANLinear(4, 3, 6, 3, (-2.0, 2.0))
    for value in theirs.parameters():
        torch.nn.init.normal_(value)
    ours = KANLinear(4, 3, 6, grid_range=[-2, 2])
    ours.load_state_dict(theirs.state_dict())
    assert ours.has_uniform_grid
    x = torch.randn(50, 4) * 2
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours.update_grid(x)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid_size", [5, 50])
def test_the_benchmark_compares_equal_functions(grid_size):
    kan_layers = pytest.importorskip("benchmarks.kan_layers", exc_type=ImportError)
    made = kan_layers.layers(32, 8, 6, grid_size, compiled=False)
    assert {layer.name.split()[0].strip(",") for layer in made} == {
        *("KANLinear", "efficient-kan's", "inkan", "pykan", "nn.Linear")
    }
    x = torch.randn(32, 8) * 2
    kan_layers.assert_same_function(made, x)
    with torch.no_grad():
        made[1].module.spline_weight[0, 0] += 1
    with pytest.raises(AssertionError, match="efficient-kan"):
        kan_layers.assert_same_function(made, x)
    kept = {layer.name: kan_layers.kept_bytes(layer, x.clone().requires_grad_()) for layer in made}
    assert kept["KANLinear"] == made[0].module.spline_weight.nbytes  # only the scaled weights, for any number of rows
    assert kept["efficient-kan's formulation"] > 5 * kept["KANLinear"] > 0 == kept["nn.Linear"]
