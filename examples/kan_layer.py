"""A KAN fits a function of two variables, moves its grid to the data, and hands its splines to scipy."""

import torch

from lesa_kernels import KAN, KANLinear

torch.manual_seed(0)
x = torch.rand(1024, 2) * 4 - 2
y = torch.sin(2 * x[:, :1]) + x[:, 1:] ** 2

model = KAN([2, 8, 1], grid_range=(-2, 2))  # efficient-kan's constructor; its checkpoints load with load_state_dict
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(300):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean() + 1e-5 * model.regularization_loss()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    print(f"mean squared error {(model(x) - y).square().mean():.5f}")
    before = model(x)
    model(x, update_grid=True)
    print(f"moving the grids to the data changed the outputs by at most {(model(x) - before).abs().max():.4f}")

first = model.layers[0]
splines = first.to_bsplines()  # scipy.interpolate.BSpline: one for each input, with all its outputs
print("slopes of the first input's splines at 0:", splines[0].derivative()(0.0).round(2))
again = KANLinear.from_bsplines(splines)
with torch.no_grad():
    again.base_weight.copy_(first.base_weight)
    torch.testing.assert_close(again(x), first(x), rtol=1e-4, atol=1e-4)
