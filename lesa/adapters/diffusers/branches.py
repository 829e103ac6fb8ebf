"""The branches of guidance of a generation: which branch a call belongs to, and whether its conditions changed."""

from collections.abc import Collection

from lesa.adapters.diffusers.conditions import Arguments, Conditions, Signature, signature_of
from lesa.adapters.diffusers.mean_output import MeanOutput
from lesa.adapters.diffusers.precomputed import PrecomputedOutputs
from lesa.adapters.diffusers.time_check import TimeCheck

MOST = 8  # unnamed branches; more calls per step are windows of a long video, or the scheduler never advanced
SHAPES = "the shapes of its inputs changed"
REPLACED = "its conditioning was replaced or written to"
SEVERAL = "one branch takes several calls a step"
TOO_MANY = f"there are more than {MOST} calls a step without a name"


class Branch:
    """One branch of guidance during one generation.

    Attributes:
        name: given by the pipeline, or ``call0``, ``call1``, ...
        conditions: the values that it is called with.
        signature: shapes and dtypes of its latest call.
        precomputed: precomputed outputs, if there are any.
        time_check: whether it is called with the times that these were computed for.
        must_run: why its current call has to run in full; empty: it need not.
    """

    def __init__(self, name: str, step: int, conditions: Conditions, arguments: Arguments, must_run: str = "") -> None:
        self.name = name
        self.conditions = conditions
        self.signature: Signature = signature_of(arguments)
        self.precomputed: PrecomputedOutputs | None = None
        self.mean_output = MeanOutput()
        self.time_check = TimeCheck()
        self.must_run = must_run
        self._step = step
        self._always = must_run  # why all of its calls have to
        self._next = ""  # why the next one has to

    def called_at(self, step: int) -> bool:
        """Whether its latest call was at this step."""
        return self._step == step

    def call(self, step: int, conditions: Conditions | None, arguments: Arguments) -> "Branch":
        """Update the branch with a call; ``conditions``: the new ones, if they changed."""
        if self._step == step:  # features of one call would be used for another
            self._always = self._always or SEVERAL
        self._step = step
        signature, changed = signature_of(arguments), ""
        if conditions is not None:
            self.conditions, changed = conditions, REPLACED
        if signature != self.signature:
            self.signature, changed = signature, SHAPES
        self.must_run = self._always or self._next or changed
        self._next = ""
        if self.must_run:
            self._forget()
        return self

    def invalidate(self, reason: str) -> None:
        """Everything that was kept or computed so far is invalid."""
        self._next = reason
        self._forget()

    def _forget(self) -> None:
        self.precomputed, self.mean_output = None, MeanOutput()


class Branches:
    """All branches of one generation.

    If the pipeline names no branch, calls are told apart by their conditions: guidance may start or end part-way, so
    the first call of a step is not always of the same branch. Calls with equal conditions, such as windows of a long
    video, are told apart by their order.

    Args:
        step_arguments: the arguments that are new at every step; all others are conditions.
    """

    def __init__(self, step_arguments: Collection[str]) -> None:
        self._step_arguments = step_arguments
        self._known: dict[str, Branch] = {}

    def of(self, name: str | None, step: int, arguments: Arguments) -> Branch:
        """The branch of a call with these arguments; ``name``: the cache context of the pipeline, if it sets one."""
        if name is not None:
            return self._named(name, step, arguments)
        free = [branch for branch in self._known.values() if not branch.called_at(step)]
        for branch in free:
            if branch.conditions.are_in(arguments):
                return branch.call(step, None, arguments)
        due = self._known.get(f"call{len(self._known) - len(free)}")  # the next in order
        for branch in sorted(free, key=lambda branch: branch is not due):
            if branch.conditions.are_still(arguments):
                return branch.call(step, None, arguments)
        conditions = Conditions(arguments, self._step_arguments)
        if due in free and not due.conditions.have_shapes_of(arguments):  # another batch size
            return due.call(step, conditions, arguments)
        if len(self._known) >= MOST:
            return Branch(f"call{MOST}", step, conditions, arguments, TOO_MANY)
        return self._new(f"call{len(self._known)}", step, conditions, arguments)

    def invalidate(self, reason: str) -> None:
        """Everything that was kept or computed so far is invalid, in all branches."""
        for branch in self._known.values():
            branch.invalidate(reason)

    def _named(self, name: str, step: int, arguments: Arguments) -> Branch:
        branch = self._known.get(name)
        if branch is None:
            return self._new(name, step, Conditions(arguments, self._step_arguments), arguments)
        if branch.conditions.are_still(arguments):
            return branch.call(step, None, arguments)
        return branch.call(step, Conditions(arguments, self._step_arguments), arguments)

    def _new(self, name: str, step: int, conditions: Conditions, arguments: Arguments) -> Branch:
        branch = self._known[name] = Branch(name, step, conditions, arguments)
        return branch
