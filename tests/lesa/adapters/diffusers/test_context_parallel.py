"""Context parallelism of diffusers: two processes with gloo hold half of the tokens each, and predict those."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig

import lesa
from lesa import Guard, Taylor
from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS
from tests.lesa.adapters.diffusers import probes, tiny
from tests.lesa.adapters.diffusers.models import check
from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.tiny import generate

# Tokens are split before FLUX, and before the first block of Wan and Qwen-Image; outputs are gathered at the end.
MODELS = ("FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel")
KINDS = ("ulysses", "ring")
CASES = [
    (kind, name) for kind in KINDS for name in MODELS if (kind, name) != ("ring", MODELS[2])
]  # Qwen-Image has an attention mask


def attention(ctx, query, key, value, *_, scale=None, **__):
    """An attention backend for the ring on a CPU: outputs [B, T, H, D] and log-sum-exps [B, T, H]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    outputs = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    return outputs, scores.logsumexp(dim=-1).transpose(1, 2)


pytestmark = pytest.mark.skipif(
    not {"ring_anything", "mesh"} <= getattr(ContextParallelConfig, "__dataclass_fields__", {}).keys(),
    reason="this diffusers needs a GPU, or even numbers of tokens and heads",
)


def share(transformer, kind):
    """Split the tokens, of any number, between the two processes."""
    shape = (2, 1) if kind == "ring" else (1, 2)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    options = {f"{kind}_degree": 2, f"{kind}_anything": True}
    transformer.enable_parallelism(config=ContextParallelConfig(**options, mesh=mesh))


def results_of_model(name, kind):
    """With skipped blocks: differences to one process, and the runs of blocks on predicted steps."""
    loop = check.Loop(name, ROWS[name])
    with lesa.enable(loop, Taylor(1), check.PLAN):
        alone = loop()
    share(loop.transformer, kind)
    runs = check.BlockRuns(loop.transformer, ROWS[name].embedders)
    with lesa.enable(loop, Taylor(1), check.PLAN) as handle:
        together = loop(each=runs.store)
        predicted = [record.predicted for record in handle.records]
    ran = sum(runs.stored[step, branch] for step in check.PLAN.predicted_steps for branch in check.BRANCHES)
    return {"error": check.error(together, alone), "predicted": predicted, "ran": ran}


def results_of_pipeline(kind, *, first):
    """The same with a known output head; ``first``: lesa is enabled before the tokens are split."""
    made = tiny.pipeline()
    runs = probes.BlockRuns(made.transformer)
    untouched = generate(made, guidance=3.0)
    runs_per_step = runs.count / tiny.STEPS
    with lesa.enable(made, Taylor(1), probes.PLAN):
        alone = generate(made, guidance=3.0)
    if not first:
        share(made.transformer, kind)
    with lesa.enable(made, Taylor(1), probes.PLAN) as handle:
        if first:
            share(made.transformer, kind)
        runs.count = 0
        together = generate(made, guidance=3.0)
        ran = runs.count - runs_per_step * len(probes.PLAN.full_steps)
        predicted = [record.predicted for record in handle.records]
    restored = generate(made, guidance=3.0)
    error = float(max((together - alone).norm() / alone.norm(), (restored - untouched).norm() / untouched.norm()))
    return {"error": error, "predicted": predicted, "ran": ran}


def error_of_a_guard():
    """The message with which a guard with extra full steps is refused."""
    made = tiny.pipeline()
    share(made.transformer, "ulysses")
    with lesa.enable(made, Taylor(1), probes.PLAN, guard=Guard(max_error=1e-9, extra_steps=2)):
        try:
            generate(made)
        except ValueError as error:
            return str(error)
    return None


def work(rank, size, folder):
    """The work of one process, which writes its results to a file."""
    from diffusers.models import attention_dispatch

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by the number of accelerators
    dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    known, found = (
        dict(OUTPUT_HEADS),
        {"guard": error_of_a_guard(), "lesa, then ulysses": results_of_pipeline("ulysses", first=True)},
    )
    for kind in KINDS:
        if kind == "ring":
            attention_dispatch._native_attention_forward_op = attention
        found[f"{kind}, then lesa"] = results_of_pipeline(kind, first=False)
        OUTPUT_HEADS.clear()
        found |= {f"{kind} of {name}": results_of_model(name, kind) for case, name in CASES if case == kind}
        OUTPUT_HEADS.update(known)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("context-parallel")
    mp.spawn(work, args=(2, folder), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("order", ["ulysses, then lesa", "lesa, then ulysses", "ring, then lesa"])
def test_two_processes_that_share_the_tokens_predict_the_same_as_one(found, order):
    for mine in found:
        assert mine[order]["error"] < 1e-5
        assert mine[order]["predicted"] == [list(probes.PLAN.predicted_steps)] * 2
        assert mine[order]["ran"] == 0


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_block_runs_on_a_predicted_step_with_split_tokens(found, kind, name):
    for mine in found:
        assert mine[f"{kind} of {name}"]["error"] < 1e-5
        assert mine[f"{kind} of {name}"]["predicted"] == [list(check.PLAN.predicted_steps)] * 2
        assert mine[f"{kind} of {name}"]["ran"] == 0


def test_a_guard_with_extra_steps_is_refused_with_several_processes(found):
    assert all("give lesa.Guard(extra_steps=0)" in mine["guard"] for mine in found)
