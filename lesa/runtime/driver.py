"""The contract between an adapter, which intercepts a transformer, and a driver, which decides what each call does."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lesa.statistics.output_errors import LinearHead
from lesa.tables.memory import IntervalPrediction, SubstepMemory


class LesaWarning(UserWarning):
    """Something runs, but not as fast or as well as was asked for."""


class Warnings:
    """Gives each warning once, and keeps it.

    Python shows a warning of the same text and place once in a process, so the second of two handles would be silent.
    Here each handle warns for itself.

    Attributes:
        given: the warnings so far, in order.
    """

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, text: str) -> None:
        """Warn with a :class:`LesaWarning`, unless this text was given before."""
        if text not in self.given:
            self.given.append(text)
            frame = sys._getframe(1)
            warnings.warn_explicit(text, LesaWarning, frame.f_code.co_filename, frame.f_lineno, registry={})


class Session:
    """One user of a transformer: a scheduler, or a thread where the scheduler is not known.

    Several sessions may have a generation at the same time; each has one at most. State is stored in weak dictionaries
    under the session, so it is freed with the scheduler or the thread.
    """

    __slots__ = ("__weakref__",)


ONLY_SESSION = Session()  # of an adapter that serves one user
UNKNOWN_SAMPLER = "it is not known how the sampler uses the output"


class Call(NamedTuple):
    """One evaluation of a transformer for one branch.

    Attributes:
        component: the transformer's name in its pipeline.
        branch: the branch of guidance, such as ``"cond"``.
        step: its index in the schedule.
        times: noise levels [steps + 1] float64 of the generation; None: they are not known.
        generation: an object that is the same for all calls of a generation.
        signature: shapes and dtypes of the inputs; features of different signatures are never combined.
        layer_norm: the output head begins with a layer norm, so the channel mean of a feature has no effect.
        must_run: why this step has to run in full and the features kept so far are invalid, such as changed
            conditions; empty: it may be predicted.
        head: evaluates the output head at this step; None, or a result of None: it is not known.
        session: the user whose generation this is.
        indivisible: why the output cannot be the mean over substeps; empty: it can, since the sampler moves the sample
            by ``output * length of the step``.
    """

    component: str
    branch: str
    step: int
    times: Tensor | None
    generation: object
    signature: tuple[Any, ...]
    layer_norm: bool = False
    must_run: str = ""
    head: Callable[[], LinearHead | None] | None = None
    session: Session = ONLY_SESSION
    indivisible: str = UNKNOWN_SAMPLER


class Driver:
    """Decides for each call whether the blocks run, and takes or makes the feature that enters each head.

    An adapter calls :meth:`begin`, then :meth:`keep` or :meth:`predict` for each head, then :meth:`end`. This base
    class runs every step in full and keeps nothing.
    """

    def begin(self, call: Call) -> bool:
        """A call starts. True: its blocks are skipped, and :meth:`predict` is called for each head."""
        return False

    def keep(self, head: str, feature: Tensor) -> None:
        """The true feature [*feature] of the current call at a head; copy it to keep it."""

    def predict(self, head: str) -> Tensor:
        """The predicted feature [*feature] of the current call at a head."""
        raise NotImplementedError(f"{type(self).__name__} predicts no step")

    def predict_interval(self, head: str) -> IntervalPrediction | None:
        """The predictions of the current step and the steps until the next full one; None: make them one by one."""
        return None

    def mean(self, head: str) -> tuple[Tensor | None, float] | None:
        """Before a full step that is divided into substeps: the mean feature over it, as a known part [*feature] (None:
        nothing) and the weight of the feature that :meth:`keep` will get. None: the step is not divided.
        """
        return None

    def divided(self, head: str) -> SubstepMemory | None:
        """The memory of a head whose steps are divided into substeps; None: they are not."""
        return None

    def end(self, *, failed: bool) -> None:
        """The call is over; ``failed``: it raised an exception."""

    def reset(self, session: Session | None = None) -> None:
        """Drop all state of a session, whose pipeline call is done, or of all sessions."""

    def check_shared_tokens(self) -> None:
        """Called if several processes share the tokens: raise a ValueError if they could run different steps."""
