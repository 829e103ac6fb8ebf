"""Intercepts each call of a transformer: the whole forward, the forward without blocks, or no forward at all."""

import functools
import inspect
from collections.abc import Callable
from threading import RLock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lesa.adapters.diffusers.branches import Branch, Branches
from lesa.adapters.diffusers.compat import CacheContexts, can_bypass_forward
from lesa.adapters.diffusers.mean_output import OutputSum
from lesa.adapters.diffusers.models import STEP_ARGUMENTS, TIME_ARGUMENTS, find_layout
from lesa.adapters.diffusers.output_heads import Arguments, OutputHead, linear_head
from lesa.adapters.diffusers.precomputed import PrecomputedOutputs, one_step
from lesa.adapters.diffusers.step_clock import StepClock, StepInfo
from lesa.adapters.diffusers.structure import Structure
from lesa.adapters.hooks import SkipState, needs_gradients
from lesa.runtime.driver import Call, Session

CHANGED = "a module of the transformer was wrapped or replaced, or an adapter came or went"


class InnerHooks(Protocol):
    """The hooks inside the transformer, and the modules that they are on."""

    state: SkipState
    structure: Structure

    def hook_blocks(self) -> None:
        """Hook the blocks, if they are not hooked yet."""

    def update(self) -> None:
        """Put the hooks on the modules that the transformer has now."""


class TransformerHook:
    """Asks the driver at every call whether the blocks are skipped.

    If they are and the output head is known, the output is computed from the predictions without the forward. Else the
    forward runs, and on a predicted step every block returns its inputs.

    Args:
        inner: the hooks inside the transformer.
        transformer: the module itself, not a compiled wrapper.
        component: its name in the pipeline.
        clock: tells the step of a call.
        contexts: knows the cache context that the pipeline has set.
        lock: held during each call.
    """

    def __init__(
        self,
        inner: InnerHooks,
        transformer: nn.Module,
        component: str,
        clock: StepClock,
        contexts: CacheContexts,
        lock: RLock,
    ) -> None:
        self._inner = inner
        self._state = inner.state
        self._transformer = transformer
        self._component = component
        self._clock = clock
        self._contexts = contexts
        self._lock = lock
        self._head = next(iter(inner.structure.heads))
        self._fills_cache = find_layout(transformer).fills_cache
        self._names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._step_arguments = {self._names[0], *TIME_ARGUMENTS, *STEP_ARGUMENTS, "return_dict"}
        self._generations: WeakKeyDictionary[Session, tuple[object, Branches]] = WeakKeyDictionary()

    @torch.compiler.disable(
        recursive=False,
        reason="lesa decides outside of compiled code: call torch.compile(transformer) before lesa.enable, or "
        "transformer.compile() at any time",
    )
    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            begun = self._begin(args, kwargs)
            if begun is None:
                return forward(*args, **kwargs)
            failed = True
            try:
                output = self._predicted(*begun)
                if output is None:
                    divided = self._is_divided(*begun)
                    output = self._state.run(forward, args, kwargs, mean=not divided)
                    if divided:
                        output = self._mean_output(output, *begun)
                failed = False
                return output
            finally:
                self._end(*begun, failed=failed)

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Branch, StepInfo, Arguments] | None:
        """The branch, step and arguments of a call, after the driver was asked; None if the call is no step."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        tensors = (value for value in arguments.values() if isinstance(value, Tensor))
        if self._fills_cache(arguments) or needs_gradients(self._transformer, tensors):
            return None
        info = self._clock.read(arguments, self._component, self._transformer)
        branch = self._branches(info).of(self._contexts.name, info.step, arguments)
        self._state.begin(self._call(info, branch, arguments), _dtype(arguments))
        return branch, info, arguments

    @torch.compiler.disable
    def _end(self, branch: Branch, info: StepInfo, arguments: Arguments, *, failed: bool) -> None:
        if failed:
            self._generations.pop(info.session, None)
        elif info.times is not None and info.step == len(info.times) - 2:
            branch.precomputed = None
        self._state.end(failed=failed)

    def reset(self) -> None:
        """Drop the generation of the pipeline that is done, or all generations if it is not known which."""
        with self._lock:
            session = self._clock.session(self._component, self._transformer)
            if session is None:
                self._generations.clear()
            else:
                self._generations.pop(session, None)
            self._state.driver.reset(session)

    def _branches(self, info: StepInfo) -> Branches:
        """The branches of the generation of a call. The modules are searched when a generation begins."""
        generation, branches = self._generations.get(info.session, (None, None))
        if branches is None or generation is not info.generation:
            self._update_hooks()
            if self._state.split:
                self._state.driver.check_shared_tokens()
            branches = Branches(self._step_arguments)
            self._generations[info.session] = info.generation, branches
        elif not self._inner.structure.is_current():
            self._update_hooks()
        return branches

    def _update_hooks(self) -> None:
        """Follow changes of the modules; features of the older modules are invalid in all generations."""
        current = self._inner.structure.is_current()
        self._inner.update()
        if not current:
            for _, branches in self._generations.values():
                branches.invalidate(CHANGED)

    def _call(self, info: StepInfo, branch: Branch, arguments: Arguments) -> Call:
        known = self._inner.structure.output_head is not None
        return Call(
            self._component,
            branch.name,
            info.step,
            info.times,
            info.generation,
            branch.signature,
            known,
            branch.must_run,
            functools.partial(linear_head, self._transformer, arguments) if known else None,
            info.session,
            info.indivisible,
        )

    @torch.compiler.disable
    def _predicted(self, branch: Branch, info: StepInfo, arguments: Arguments) -> Any:
        """The output of a predicted step if the output head is known and fits this call; else None."""
        head = self._inner.structure.output_head
        if not self._state.skip:
            if head is not None and info.timesteps is not None and head.fits(self._transformer, arguments):
                branch.time_check.begin(arguments["timestep"], _time(head, info))
            return None
        if head is None or not self._skips_forward(head, branch, info, arguments):
            self._inner.hook_blocks()
            return None
        driver, memory = self._state.driver, self._state.driver.divided(self._head)
        precomputed = self._precomputed(branch, head)
        if memory is not None:
            sample = branch.mean_output.predicted(info.step, memory, self._outputs(precomputed, info, arguments))
            return _output(sample, arguments)
        if not precomputed.holds(info.step):
            interval = driver.predict_interval(self._head) if info.timesteps is not None else None
            precomputed.compute(arguments, info, interval or one_step(driver.predict(self._head), info.step))
        return _output(precomputed.take(info.step), arguments)

    @torch.compiler.disable
    def _is_divided(self, branch: Branch, info: StepInfo, arguments: Arguments) -> bool:
        """Whether this full step is divided into substeps whose outputs the known output head can compute."""
        head = self._inner.structure.output_head
        if self._state.skip or head is None or self._state.driver.divided(self._head) is None:
            return False
        return self._skips_forward(head, branch, info, arguments)

    @torch.compiler.disable
    def _mean_output(self, output: Any, branch: Branch, info: StepInfo, arguments: Arguments) -> Any:
        """The output of a full step as the mean over its substeps."""
        memory, head = self._state.driver.divided(self._head), self._inner.structure.output_head
        if memory is None or head is None:
            return output
        outputs = self._outputs(self._precomputed(branch, head), info, arguments)
        sample = output.sample if hasattr(output, "sample") else output[0]
        return _output(branch.mean_output.full(sample, info.step, memory, outputs), arguments)

    def _precomputed(self, branch: Branch, head: OutputHead) -> PrecomputedOutputs:
        branch.precomputed = branch.precomputed or PrecomputedOutputs(self._transformer, head)
        return branch.precomputed

    @staticmethod
    def _outputs(precomputed: PrecomputedOutputs, info: StepInfo, arguments: Arguments) -> OutputSum:
        return functools.partial(precomputed.sum, arguments, info)

    def _skips_forward(self, head: OutputHead, branch: Branch, info: StepInfo, arguments: Arguments) -> bool:
        layer = getattr(self._transformer, head.projection)
        return (
            can_bypass_forward(layer, arguments[self._names[0]], arguments.values())
            and head.fits(self._transformer, arguments)
            and (
                info.timesteps is None  # then the time of the call itself is used
                or branch.time_check.passes(arguments["timestep"], _time(head, info))
            )
        )


def _time(head: OutputHead, info: StepInfo) -> float:
    """The time that a model is called with at this step."""
    return info.values[info.step] * head.time_unit / 1000


def _output(sample: Tensor, arguments: Arguments) -> Any:
    """What forward returns."""
    return Transformer2DModelOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)


def _dtype(arguments: Arguments) -> torch.dtype | None:
    latents = arguments.get("hidden_states")
    return latents.dtype if isinstance(latents, Tensor) and latents.is_floating_point() else None
