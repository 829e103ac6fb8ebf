"""Intercepts each call of a transformer: the whole forward, the forward without blocks, or no forward at all."""

import functools
import inspect
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lesa.adapters.diffusers.ahead import Ahead, one_step
from lesa.adapters.diffusers.branches import Branch, Branches
from lesa.adapters.diffusers.clock import Clock, Moment
from lesa.adapters.diffusers.compat import CacheContexts, is_at_hand
from lesa.adapters.diffusers.discovery import CHANGING, TIMES, find_layout
from lesa.adapters.diffusers.endings import Arguments, Ending, linear_head
from lesa.adapters.hooks import needs_gradients
from lesa.runtime.driver import Call, Driver, Session
from lesa.runtime.guard import Guard

if TYPE_CHECKING:
    from lesa.adapters.diffusers.attachment import Attachment

CHANGED = "a module of the transformer was wrapped or replaced, or an adapter came or went"


class Root:
    """Asks the driver at every call whether the blocks are skipped.

    If so, and the end of the model is known, the output comes from the predictions at once, without the forward. Else
    the forward runs, and on a predicted step every block returns its inputs.

    Args:
        attachment: the hooks inside the transformer, and what they look at.
        transformer: the module itself, not a compiled wrapper.
        component: its name in the pipeline.
        clock: tells the moment of a call.
        contexts: knows the cache context that the pipeline has set.
        lock: held during each call.
    """

    def __init__(
        self,
        attachment: "Attachment",
        transformer: nn.Module,
        component: str,
        clock: Clock,
        contexts: CacheContexts,
        lock: RLock,
    ) -> None:
        self.attachment = attachment
        self.control = attachment.control
        self.transformer = transformer
        self.component = component
        self.clock = clock
        self.contexts = contexts
        self.lock = lock
        self.head = next(iter(attachment.structure.heads))
        self.fills_cache = find_layout(transformer).fills_cache
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.changing = {self.names[0], *TIMES, *CHANGING, "return_dict"}
        self._generations: WeakKeyDictionary[Session, tuple[object, Branches]] = WeakKeyDictionary()

    @torch.compiler.disable(
        recursive=False,
        reason="lesa decides outside of compiled code: call torch.compile(transformer) before lesa.enable, or "
        "transformer.compile() at any time",
    )
    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.lock:
            begun = self._begin(args, kwargs)
            if begun is None:
                return forward(*args, **kwargs)
            failed = True
            try:
                output = self._predicted(*begun)
                if output is None:
                    output = self.control.run(forward, args, kwargs)
                failed = False
                return output
            finally:
                self._end(*begun, failed=failed)

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Branch, Moment, Arguments] | None:
        """Whose call this is, with the driver asked what becomes of it; None if it is no step that lesa knows."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = (value for value in arguments.values() if isinstance(value, Tensor))
        if self.fills_cache(arguments) or needs_gradients(self.transformer, tensors):
            return None
        moment = self.clock.read(arguments, self.component, self.transformer)
        branch = self._branches(moment).of(self.contexts.name, moment.step, arguments)
        self.control.begin(self._call(moment, branch, arguments), _dtype(arguments))
        return branch, moment, arguments

    @torch.compiler.disable
    def _end(self, branch: Branch, moment: Moment, arguments: Arguments, *, failed: bool) -> None:
        if failed:
            self._generations.pop(moment.session, None)
        elif moment.times is not None and moment.step == len(moment.times) - 2:
            branch.ahead = None
        self.control.end(failed=failed)

    def reset(self) -> None:
        """Forget the generation of the pipeline that is done, or all if nobody knows which that is."""
        with self.lock:
            session = self.clock.session(self.component, self.transformer)
            if session is None:
                self._generations.clear()
            else:
                self._generations.pop(session, None)
            self.control.driver.reset(session)

    def _branches(self, moment: Moment) -> Branches:
        """Those of the generation of a call; the structure of the model is looked at when it begins."""
        generation, branches = self._generations.get(moment.session, (None, None))
        if branches is None or generation is not moment.generation:
            self._look_again()
            if self.control.split:
                refuse_guard(self.control.driver)
            branches = Branches(self.changing)
            self._generations[moment.session] = moment.generation, branches
        elif not self.attachment.structure.is_current():
            self._look_again()
        return branches

    def _look_again(self) -> None:
        """What was kept of an older structure is of no use, in any generation that is going on."""
        current = self.attachment.structure.is_current()
        self.attachment.look_again()
        if not current:
            for _, branches in self._generations.values():
                branches.forget(CHANGED)

    def _call(self, moment: Moment, branch: Branch, arguments: Arguments) -> Call:
        known = self.attachment.structure.ending is not None
        return Call(
            self.component,
            branch.name,
            moment.step,
            moment.times,
            moment.generation,
            branch.signature,
            known,
            branch.must_run,
            functools.partial(linear_head, self.transformer, arguments) if known else None,
            moment.session,
        )

    @torch.compiler.disable
    def _predicted(self, branch: Branch, moment: Moment, arguments: Arguments) -> Any:
        """The output of a predicted step, where the end of the model is known and holds for this call; else None."""
        if not self.control.skip:
            return None
        ending = self.attachment.structure.ending
        if ending is None or not self._can_go_to(ending, branch, moment, arguments):
            self.attachment.hook_blocks()
            return None
        if branch.ahead is None:
            branch.ahead = Ahead(self.transformer, ending)
        if not branch.ahead.holds(moment.step):
            driver = self.control.driver
            coming = driver.coming(self.head) if moment.timesteps is not None else None
            branch.ahead.make(arguments, moment, coming or one_step(driver.predict(self.head), moment.step))
        sample = branch.ahead.take(moment.step)
        return Transformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)

    def _can_go_to(self, ending: Ending, branch: Branch, moment: Moment, arguments: Arguments) -> bool:
        layer = getattr(self.transformer, ending.projection)
        return (
            is_at_hand(layer, arguments[self.names[0]], arguments.values())
            and ending.fits(self.transformer, arguments)
            and (
                moment.timesteps is None  # the time of the call itself is used then
                or branch.time_check.passes(arguments["timestep"], moment.values[moment.step] * ending.time_unit / 1000)
            )
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


def _dtype(arguments: Arguments) -> torch.dtype | None:
    latents = arguments.get("hidden_states")
    return latents.dtype if isinstance(latents, Tensor) and latents.is_floating_point() else None
