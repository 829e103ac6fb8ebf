"""Models outside diffusers: a plain diffusion transformer, defined here."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lesa
from lesa import FeatureHistory, LesaConfig, LesaPredictor, LesaWarning, Reuse, StepPlan, Taylor

STEPS = 10
PLAN = StepPlan(STEPS, [0, 1, 4, 7])
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


class Block(nn.Module):
    """Attention and a small MLP, both modulated by the condition."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, condition):
        scale, gate = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        y = self.norm(x) * (1 + scale)
        x = x + gate * self.attention(y, y, y, need_weights=False)[0]
        return x + gate * self.mlp(self.norm(x))


class PlainDiT(nn.Module):
    """A small diffusion transformer for class labels."""

    def __init__(self, width=16, depth=3, channels=4, tokens=6):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.randn(tokens, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)

    def forward(self, x, t, label):
        condition = self.time(t.reshape(-1, 1)) + self.labels(label)
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x))


@pytest.fixture
def dit():
    return PlainDiT().eval()


@torch.no_grad()
def sample(dit, steps=None, guidance=1.0, batch=2, named=False):
    """The result of Euler steps; ``steps`` is the return value of :func:`lesa.enable_module`, or None without lesa."""
    torch.manual_seed(0)
    x, labels, nothing = torch.randn(batch, 6, 4), torch.arange(batch), torch.full((batch,), 4)
    for i in range(STEPS):
        t = torch.full((batch,), float(TIMES[i]))

        def at(branch, i=i):
            return nullcontext() if steps is None else steps.step(i, branch if named else None)

        with at("cond"):
            velocity = dit(x, t, labels)
        if guidance != 1:
            with at("uncond"):
                velocity = torch.lerp(dit(x, t, nothing), velocity, guidance)
        x = x + float(TIMES[i + 1] - TIMES[i]) * velocity
    return x


def enable(dit, forecaster=None, **options):
    """Enable lesa on the module, by default with Taylor of order 1."""
    return lesa.enable_module(dit, forecaster or Taylor(1), PLAN, blocks=dit.blocks, head=dit.norm, **options)


def test_a_plain_diffusion_transformer_is_accelerated_in_ten_lines(dit):
    x, times, label = torch.randn(1, 6, 4), torch.linspace(1, 0, 11), torch.tensor([1])
    plan = lesa.StepPlan(10, [0, 1, 4, 7])
    with lesa.enable_module(dit, lesa.Taylor(2), plan, blocks=dit.blocks, head=dit.norm, times=times) as steps:
        for i in range(10):
            with steps.step(i), torch.no_grad():
                velocity = dit(x, times[i : i + 1], label)
            x = x + (times[i + 1] - times[i]) * velocity
    assert steps.records[0].predicted == list(plan.predicted_steps)
    assert bool(x.isfinite().all())


def test_a_custom_loop_may_use_a_history_directly(dit):
    x, label, table = torch.randn(1, 6, 4), torch.tensor([1]), Taylor(2).table(PLAN, TIMES)
    history, ran = FeatureHistory(table), []
    with torch.no_grad():
        for i in range(STEPS):
            if history.can_predict(i):
                feature = history.predict(i)
            else:
                ran.append(i)
                condition = dit.time(TIMES[i].float().reshape(1, 1)) + dit.labels(label)
                feature = dit.embed(x) + dit.positions
                for block in dit.blocks:
                    feature = block(feature, condition)
                history.keep(i, feature)
            x = x + float(TIMES[i + 1] - TIMES[i]) * dit.out(dit.norm(feature))
    assert ran == list(PLAN.full_steps)
    torch.manual_seed(0)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(2), LesaPredictor(LesaConfig(STEPS, hidden_dim=8))])
def test_the_input_of_the_head_is_predicted_by_the_table(dit, forecaster):
    seen = []
    with enable(dit, forecaster, times=TIMES) as steps:
        dit.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        sample(dit, steps)
    table = forecaster.table(PLAN, TIMES)
    full = torch.stack([seen[step] for step in PLAN.full_steps]).double()
    for row, bias, step in zip(table.coefficients, table.bias, PLAN.predicted_steps, strict=True):
        expected = torch.einsum("j,j...->...", row, full) + bias
        torch.testing.assert_close(seen[step].double(), expected, rtol=1e-4, atol=1e-4)


def test_no_block_runs_on_a_predicted_step(dit):
    ran = []
    for block in dit.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: ran.append(now))
    with enable(dit) as steps, torch.no_grad():
        for now in range(STEPS):
            with steps.step(now):
                dit(torch.randn(2, 6, 4), torch.rand(2), torch.arange(2))
    assert sorted(set(ran)) == list(PLAN.full_steps)


@pytest.mark.parametrize("named", [True, False])
def test_each_branch_has_its_own_features_and_forecaster(dit, named):
    names = ("cond", "uncond") if named else ("call0", "call1")
    forecasters = {("transformer", names[0]): Reuse(), ("transformer", names[1]): Taylor(1)}
    with enable(dit, forecasters) as steps:
        sample(dit, steps, guidance=3.0, named=True) if named else sample(dit, steps, guidance=3.0)
        assert [(r.branch, r.predicted) for r in steps.records] == [(n, list(PLAN.predicted_steps)) for n in names]


def test_a_repeated_generation_is_equal_and_the_batch_size_may_change(dit):
    with enable(dit) as steps:
        first = sample(dit, steps)
        assert sample(dit, steps, batch=3).shape[0] == 3
        assert torch.equal(sample(dit, steps), first)


def test_disable_restores_the_module(dit):
    untouched, kind = sample(dit), type(dit)
    steps = enable(dit)
    assert torch.equal(sample(dit), untouched)  # outside of steps.step the module runs as it is
    assert not torch.equal(sample(dit, steps), untouched)
    steps.disable()
    steps.disable()
    assert type(dit) is kind
    assert torch.equal(sample(dit), untouched)
    assert not any(m._forward_pre_hooks or "_lesa_answer" in vars(m) for m in dit.modules())


def test_an_exception_does_not_change_the_next_generation(dit):
    with enable(dit) as steps:
        first = sample(dit, steps)
        with steps.step(3), pytest.raises(IndexError), torch.no_grad():
            dit(torch.randn(2, 6, 4), torch.rand(2), torch.tensor([7, 7]))
        assert torch.equal(sample(dit, steps), first)


def test_the_module_runs_without_lesa_if_gradients_are_required(dit):
    x = torch.randn(2, 6, 4, requires_grad=True)
    with enable(dit) as steps:
        for i in range(STEPS):
            with steps.step(i):
                dit(x, torch.rand(2), torch.arange(2)).sum().backward()
        assert not steps.records
    assert x.grad is not None


def test_blocks_and_head_outside_the_module_are_refused(dit):
    with pytest.raises(ValueError, match="inside PlainDiT"):
        lesa.enable_module(dit, Taylor(1), PLAN, blocks=dit.blocks, head=nn.LayerNorm(16))
    with pytest.raises(ValueError, match="inside PlainDiT"):
        lesa.enable_module(dit, Taylor(1), PLAN, blocks=[], head=dit.norm)
    with pytest.raises(ValueError, match="11"):
        enable(dit, times=[1.0, 0.0])


def test_a_generation_without_predicted_steps_gives_a_warning(dit):
    def unsteady(steps):
        for i in range(STEPS):
            batch = 1 + i % 2
            with steps.step(i), torch.no_grad():
                dit(torch.randn(batch, 6, 4), torch.rand(batch), torch.zeros(batch, dtype=torch.long))

    with enable(dit) as steps, pytest.warns(LesaWarning, match="no step"):
        unsteady(steps)


def test_any_module_works_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; import lesa; lesa.enable_module; lesa.FeatureHistory"
    subprocess.run([sys.executable, "-c", code], check=True)
