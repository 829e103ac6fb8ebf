"""Context parallelism: each process predicts its own tokens, without messages to the others."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lesa_kernels import combine, fused_output_head


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((5, 2, 12, 16), (3, 5), (3, 2, 16), (8, 16))]


def predict(history, coefficients, modulation, weight):
    return combine(history, coefficients), fused_output_head(
        history, coefficients, None, modulation, modulation, weight
    )


def work(rank, size, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    history, *rest = inputs()
    whole = predict(history, *rest)
    mine = predict(history.chunk(size, dim=2)[rank].contiguous(), *rest)
    for ours, expected in zip(mine, whole, strict=True):
        parts = [torch.empty_like(ours) for _ in range(size)]
        dist.all_gather(parts, ours.contiguous())
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=1e-6, atol=1e-6)
    dist.destroy_process_group()


def test_two_processes_with_half_the_tokens_predict_the_same_as_one(tmp_path):
    mp.spawn(work, args=(2, f"file://{tmp_path}/store"), nprocs=2)
