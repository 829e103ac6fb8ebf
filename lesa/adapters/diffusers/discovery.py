"""Where the blocks and the heads of a diffusion transformer are. Model knowledge is these names and no more."""

from torch import nn

# The final norm, or the projection where a model has no norm. What enters it is the feature that is predicted.
HEADS = ("norm_out",)
# The argument of forward that holds the time.
TIMES = ("timestep",)


def find_heads(transformer: nn.Module) -> dict[str, nn.Module]:
    """The first head that exists, by name.

    Raises:
        ValueError: if none of the known names exists.
    """
    for name in HEADS:
        module = getattr(transformer, name, None)
        if isinstance(module, nn.Module):
            return {name: module}
    raise ValueError(f"{type(transformer).__name__} has no final norm under a known name ({', '.join(HEADS)})")


def find_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Every block of every top-level list of blocks.

    Raises:
        ValueError: if there is no such list.
    """
    blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks to skip")
    return blocks
