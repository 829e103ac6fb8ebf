"""The modules of a transformer that hooks and output heads depend on, as they were when they were last searched."""

from typing import Any

from torch import nn

from lesa.adapters.diffusers.models import find_blocks, find_heads
from lesa.adapters.diffusers.output_heads import find_output_head


class Structure:
    """The modules of a transformer.

    Users load adapters and wrap or replace layers while lesa is enabled. The modules are searched again when a
    generation begins; within a generation only those that predictions depend on are compared, in a few microseconds.

    Attributes:
        parts: all modules.
        heads: by name.
        blocks: those that predicted steps skip.
        output_head: the output head, if it is known.

    Raises:
        ValueError: if no heads or blocks can be found.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.parts = tuple(transformer.modules())
        self.heads = find_heads(transformer)
        self.blocks = list(dict.fromkeys(find_blocks(transformer)))
        self.output_head = find_output_head(transformer)
        self._transformer = transformer
        inside = {part for block in self.blocks for part in block.modules()}
        self._children = [(part._modules, list(part._modules.values())) for part in self.parts if part not in inside]
        self._adapters = _adapters(transformer)

    def is_current(self) -> bool:
        """Whether no block and no module outside of the blocks was wrapped or replaced, and no adapter came or went."""
        if _adapters(self._transformer) != self._adapters:
            return False
        return all(list(children.values()) == known for children, known in self._children)


def _adapters(transformer: Any) -> tuple[str, ...]:
    """The names of the LoRAs that are loaded."""
    return tuple(getattr(transformer, "peft_config", ()))
