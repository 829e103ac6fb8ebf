"""The root: takes every call of a transformer, before its forward and any hook of it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lesa.adapters.diffusers.ahead import Ahead, one_step
from lesa.adapters.diffusers.branches import Branches
from lesa.adapters.diffusers.clock import Clock, Moment
from lesa.adapters.diffusers.compat import StateManager, context_name, is_at_hand, is_split, refuse_caches
from lesa.adapters.diffusers.discovery import CHANGING, TIMES, find_layout
from lesa.adapters.diffusers.endings import Arguments, Ending, find_ending, linear_head
from lesa.adapters.hooks import Control, needs_gradients
from lesa.runtime.driver import Call, Driver
from lesa.runtime.guard import Guard


class Root:
    """Asks the driver at every call whether the blocks are skipped.

    If so, and the end of the model is known, the output comes from the predictions at once, without the forward. Else
    the forward runs, with the blocks handing their inputs through on a predicted step.

    Args:
        control: what the hooks inside the transformer look at.
        transformer: the module itself, not a compiled wrapper.
        component: its name in the pipeline.
        clock: tells the moment of a call.
        contexts: knows the cache context that the pipeline has set.
        head: the name of the final norm.
        hook_blocks: lets the blocks hand their inputs through, should a predicted step need the forward.
    """

    def __init__(
        self,
        control: Control,
        transformer: nn.Module,
        component: str,
        clock: Clock,
        contexts: StateManager,
        head: str,
        hook_blocks: Callable[[], None],
    ) -> None:
        self.control = control
        self.transformer = transformer
        self.component = component
        self.clock = clock
        self.contexts = contexts
        self.head = head
        self.hook_blocks = hook_blocks
        self.fills_cache = find_layout(transformer).fills_cache
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._parts = tuple(transformer.modules())  # where caches may be: to find them takes longer than to look
        self._ahead: dict[str, Ahead] = {}  # by branch
        self._branches = Branches({self.names[0], *TIMES, *CHANGING})
        self._generation: object = None
        self._ending: Ending | None = None  # in this generation

    @torch.compiler.disable(
        recursive=False,
        reason="lesa decides outside of compiled code: call torch.compile(transformer) before lesa.enable, or "
        "transformer.compile() at any time",
    )
    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = (value for value in arguments.values() if isinstance(value, Tensor))
        if self.fills_cache(arguments) or needs_gradients(self.transformer, tensors):
            return forward(*args, **kwargs)
        control, failed = self.control, True
        moment = self.clock.read(arguments)
        if moment.generation is not self._generation:
            refuse_caches(self.transformer, self._parts)
            control.split = is_split(self._parts)
            if control.split:
                refuse_guard(control.driver)
                self.hook_blocks()  # predicted steps need the forward, and blocks what they learn on a full one
            self._generation = moment.generation
            self._ending = find_ending(self.transformer)
        call = self._identify(moment, arguments)
        control.begin(call, _dtype(arguments))
        try:
            output = self._predicted(call, moment, arguments) if control.skip else None
            if output is None:
                output = control.run(forward, args, kwargs)
            failed = False
            return output
        finally:
            if failed or (moment.times is not None and moment.step == len(moment.times) - 2):
                self._ahead.pop(call.branch, None)
            control.end(failed=failed)

    def reset(self) -> None:
        """Forget everything: the pipeline is done."""
        self._ahead.clear()
        self._branches.forget()
        self._generation = None
        self.control.driver.reset()

    def _identify(self, moment: Moment, arguments: Arguments) -> Call:
        branch = context_name(self.contexts) or self._branches.name(moment, arguments)
        ahead = self._ahead.get(branch)
        must_run = False
        if ahead is not None and not ahead.is_true_for(moment, arguments):
            must_run = ahead.holds(moment)
            ahead = None
            del self._ahead[branch]
        return Call(
            self.component,
            branch,
            moment.step,
            moment.times,
            moment.generation,
            _signature(arguments) if ahead is None else ahead.signature,
            self._ending is not None,
            must_run,
            functools.partial(linear_head, self.transformer, arguments) if self._ending is not None else None,
        )

    def _predicted(self, call: Call, moment: Moment, arguments: Arguments) -> Any:
        """The output of a predicted step, where the end of the model is known; else None."""
        ahead = self._ahead.get(call.branch)
        if ahead is None or not ahead.holds(moment):
            if self._ending is None or not self._can_go_to(self._ending, arguments):
                self.hook_blocks()
                return None
            if ahead is None:
                ahead = self._ahead[call.branch] = Ahead(self.transformer, self._ending, call, arguments)
            driver = self.control.driver
            coming = driver.coming(self.head) if moment.timesteps is not None else None
            ahead.make(arguments, moment, coming or one_step(driver.predict(self.head), call.step))
        sample = ahead.take(call.step)
        return Transformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)

    def _can_go_to(self, ending: Ending, arguments: Arguments) -> bool:
        layer = getattr(self.transformer, ending.projection)
        return (
            type(layer) is nn.Linear  # it may have been wrapped since the generation began
            and is_at_hand(layer, arguments[self.names[0]], arguments.values())
            and ending.fits(self.transformer, arguments)
        )


def refuse_guard(driver: Driver) -> None:
    """Processes that share the tokens have to run the same steps.

    Raises:
        ValueError: if the driver spends full steps on errors, of which each process has its own.
    """
    guard: Guard | None = getattr(driver, "guard", None)
    if guard is not None and guard.extra_steps:
        raise ValueError(
            "under context parallelism each process sees the errors of its own tokens, and one that runs an extra full "
            "step would wait for the others; give lesa.Guard(extra_steps=0)"
        )


def _signature(arguments: Arguments) -> tuple[Any, ...]:
    return tuple((name, value.shape, value.dtype) for name, value in arguments.items() if isinstance(value, Tensor))


def _dtype(arguments: Arguments) -> torch.dtype | None:
    latents = arguments.get("hidden_states")
    return latents.dtype if isinstance(latents, Tensor) and latents.is_floating_point() else None
