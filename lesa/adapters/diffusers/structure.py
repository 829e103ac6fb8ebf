"""What the hooks and the known ends rest on: the modules of a transformer, as they were when somebody last looked."""

from typing import Any

from torch import nn

from lesa.adapters.diffusers.discovery import find_blocks, find_heads
from lesa.adapters.diffusers.endings import find_ending


class Structure:
    """The modules of a transformer.

    Adapters are loaded and taken out, layers wrapped and replaced while lesa is enabled. All of it is found anew at the
    beginning of a generation; within one only what predictions rest on is compared, in a few microseconds.

    Attributes:
        parts: all modules.
        heads: by name.
        blocks: those that predicted steps skip.
        ending: how the model ends, if that is known.

    Raises:
        ValueError: if no heads or blocks can be found.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.parts = tuple(transformer.modules())
        self.heads = find_heads(transformer)
        self.blocks = list(dict.fromkeys(find_blocks(transformer)))
        self.ending = find_ending(transformer)
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
