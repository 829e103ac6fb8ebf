"""A small diffusion transformer of your own, with its predictable steps left out."""

import torch
from torch import nn

import lesa


class Block(nn.Module):
    """Attention and a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class MyDiT(nn.Module):
    """Latents [B, T, channels] and a time to velocities of the same shape."""

    def __init__(self, width: int = 64, channels: int = 16) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(channels, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.time(t.reshape(1, 1))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


dit = MyDiT()
times = torch.linspace(1, 0, 51)
plan = lesa.StepPlan.paper(50, interval=7)
with lesa.enable_module(dit, lesa.Taylor(2), plan, blocks=dit.blocks, head=dit.norm, times=times) as steps:
    x = torch.randn(1, 256, 16)
    for i in range(50):
        with steps.step(i), torch.no_grad():
            velocity = dit(x, times[i])
        x = x + (times[i + 1] - times[i]) * velocity

print(steps.records[0])
