"""The end of a transformer, from the predicted feature to its output, for models whose end is known.

Where it is, a predicted step enters neither the forward nor any embedder. Elsewhere blocks hand their inputs through.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lesa.runtime.driver import Driver

# (transformer, arguments of forward by name, driver) -> output; None if these arguments need the whole forward
Finish = Callable[[nn.Module, dict[str, Any], Driver], Tensor | None]


def flux(transformer: Any, arguments: dict[str, Any], driver: Driver) -> Tensor | None:
    """Final norm, modulated by the time and the pooled prompt, and projection."""
    if arguments.get("joint_attention_kwargs"):
        return None  # may carry a LoRA scale, which the forward applies
    dtype = arguments["hidden_states"].dtype
    conditions = [arguments["timestep"].to(dtype) * 1000]
    if arguments.get("guidance") is not None:
        conditions.append(arguments["guidance"].to(dtype) * 1000)
    modulation = transformer.time_text_embed(*conditions, arguments["pooled_projections"])
    output: Tensor = transformer.proj_out(transformer.norm_out(driver.predict("norm_out"), modulation))
    return output


KNOWN: dict[str, Finish] = {"FluxTransformer2DModel": flux}


def find_finish(transformer: nn.Module) -> Finish | None:
    """The end of this class of transformer, if it is known."""
    return KNOWN.get(type(transformer).__name__)
