"""Block sizes of the Triton kernel of ``fused_output_head``, which are chosen without Triton from shapes and dtypes.

A program has TOKENS tokens, the fewest that a tensor core takes: an image of 4096 tokens gives 256 programs, two for
each multiprocessor of an H200. With twice the tokens there would be no second program to run while the first one waits.

Registers are the limit. A thread holds its share of the features, of the weights and of the sums of all predictions,
and all coefficients. With more than REGISTERS of these it spills, as compiled for sm_80, sm_90 and sm_100; this was not
measured on a GPU. In bf16 four warps read features 16 bytes at a time. If that needs too many registers, eight warps
read 8 bytes; if that still does, neighbouring programs make groups of the predictions and share features in L2.
"""

from dataclasses import dataclass

TOKENS = 16
CHANNEL_BYTES = 128  # of a token in one step of the loop: a whole line of the cache
MAX_FEATURES = 16
MAX_OUTPUTS = 384
OUTPUT_BLOCK = 128  # more outputs take several products, so that 384 is not padded to 512
REGISTERS = 200
REGISTERS_FEWER = 176  # where the last block of channels is not full, or operands have 32 bits
SUM_GROUP = 6  # predictions of a sum: with 10 some kernels spill; with 6, three programs fit on a multiprocessor
COEFFICIENTS = 72  # of a group; with 80 the compiler for sm_100 spills two numbers
SHARED_BYTES = 96 * 1024  # a program may have 99 KB on the smallest of these GPUs

# By default ptxas sometimes limits itself to 128 registers and spills a few, for operands of 32 bits.
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Tiles:
    """The shape of a program: ``group`` predictions of ``blocks * outputs`` outputs, ``channels`` at a time."""

    group: int
    channels: int
    outputs: int
    blocks: int
    stages: int
    options: dict[str, int]


def tiles(
    predictions: int,
    features: int,
    outputs: int,
    channels: int,
    *,
    itemsize: int,
    vector: int,
    short: bool,
    summed: bool,
) -> Tiles:
    """For ``predictions`` of ``outputs`` numbers from at most MAX_FEATURES ``features``, ``channels`` of ``itemsize``.

    Args:
        vector: elements read at once, those of 16 bytes or 1.
        short: the product takes operands of 16 bits; otherwise of 32, and eight warps from the start.
        summed: the weighted sum of the predictions, of which there may be hundreds.
    """
    span = CHANNEL_BYTES // itemsize
    block = min(OUTPUT_BLOCK, max(16, 1 << (outputs - 1).bit_length()))
    blocks = -(-outputs // block)
    operand = 2 if short else 4
    fewer = channels % span or not short or (summed and blocks > 1)
    registers = REGISTERS_FEWER if fewer else REGISTERS

    def groups(warps: int) -> int:
        """The number of groups of predictions; more than there are predictions if not even one fits."""
        threads = 32 * warps
        weights = block * blocks * span // threads * (1 if short else 3)
        shared = features * TOKENS * span // threads + weights
        each = TOKENS * block * blocks // threads + TOKENS * span // vector // threads + features
        most = min((registers - shared) // each, COEFFICIENTS // features)
        if summed:
            most = min(most, SUM_GROUP)
        if blocks > 1 and not short:
            most = 1  # and even so float32 spills 2 numbers at 192 outputs, 14 at 384
        return -(-predictions // most) if most > 0 else predictions + 1

    count, warps = min((groups(warps), warps) for warps in ((4, 8) if short else (8,)))
    group = -(-predictions // min(count, predictions))
    stage = (features * TOKENS + block * blocks) * CHANNEL_BYTES + 4 * span * group
    operands = group * TOKENS * span * operand
    options = {"num_warps": warps} if short else {"num_warps": warps, "maxnreg": MOST_REGISTERS}
    stages = 3 if 2 * stage + operands <= SHARED_BYTES else 2
    return Tiles(group, span, block, blocks, stages, options)
