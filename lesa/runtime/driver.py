"""The contract between an adapter, which is inside somebody's transformer, and whoever decides what it does."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Stream = tuple[str, str]  # (component, branch), such as ("transformer", "cond")


class LinearHead(NamedTuple):
    """The end of a transformer at one step: ``norm(feature) * multiplier @ weight.T``, what it adds left out.

    multiplier [B or 1, D], weight [O, D], eps of the norm.
    """

    multiplier: Tensor
    weight: Tensor
    eps: float


class Session:
    """One user of a transformer at a time: a scheduler, or a thread where nobody knows the scheduler.

    Several may have a generation open at once; each has one at most. Whatever belongs to a session is kept weakly by
    it, so that it goes when the scheduler or the thread does.
    """

    __slots__ = ("__weakref__",)


ONLY = Session()  # of an adapter that serves one user


class Call(NamedTuple):
    """One evaluation of a transformer for one branch.

    Attributes:
        component: the transformer's name in its pipeline.
        branch: the branch of guidance, such as ``"cond"``.
        step: its index in the schedule.
        times: noise levels [steps + 1] float64 of the generation, or None where nobody knows them.
        generation: an object that lasts as long as the generation does.
        signature: shapes and dtypes of the inputs; features of another signature do not mix.
        layer_norm: the head begins with a layer norm, which takes the mean of each token's feature away.
        must_run: why this step has to run in full and nothing kept before it may be used, such as conditions that are
            no longer those of the steps before; empty: it may be predicted.
        head: evaluates the end of the transformer at this step; None, or a result of None: it is not known.
        session: whose generation it is.
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
    session: Session = ONLY


class Coming(NamedTuple):
    """The features of the coming predicted steps, not yet combined.

    Attributes:
        steps: from the current step on, at most to the last before the next full one.
        history: kept features [m, *feature].
        coefficients: [steps, m] and bias: [steps] of each step, on the device of the features.
        means: the mean of each token of each kept feature [m, *feature without channels], if they were kept.
        centred: those means have been subtracted from the features.
    """

    steps: list[int]
    history: Tensor
    coefficients: Tensor
    bias: Tensor | None
    means: Tensor | None = None
    centred: bool = False


class Driver(Protocol):
    """Decides for each call whether the blocks run, and takes or gives the feature that enters each head."""

    def begin(self, call: Call) -> bool:
        """A call starts; True: its blocks are skipped and :meth:`predict` will be asked."""
        ...

    def keep(self, head: str, feature: Tensor) -> None:
        """The true feature of the current call, which the driver may read but must copy to keep."""
        ...

    def predict(self, head: str) -> Tensor:
        """The predicted feature of the current call."""
        ...

    def coming(self, head: str) -> Coming | None:
        """The current and all following predicted steps at once, or None if they cannot be known yet."""
        ...

    def end(self, *, failed: bool) -> None:
        """The call is over; ``failed``: by an exception."""
        ...

    def reset(self, session: Session | None = None) -> None:
        """Forget everything of a session, whose pipeline is done, or of all."""
        ...
