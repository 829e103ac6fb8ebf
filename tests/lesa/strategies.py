"""Plans, schedules and damaged files for property-based tests."""

import torch
from hypothesis import strategies as st

from lesa import GramMatrix, StepPlan


@st.composite
def plans(draw: st.DrawFn, max_steps: int = 30) -> StepPlan:
    """Any plan of up to ``max_steps`` steps."""
    num_steps = draw(st.integers(1, max_steps))
    full = draw(st.sets(st.integers(0, num_steps - 1)))
    return StepPlan(num_steps, full | {0})


def schedule(num_steps: int, shift: float = 1.15) -> torch.Tensor:
    """FLUX's times [steps + 1]: evenly spaced, shifted towards noise, ending at 0."""
    t = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    factor = torch.tensor(shift, dtype=torch.float64).exp()
    return torch.cat([factor * t / (1 + (factor - 1) * t), torch.zeros(1, dtype=torch.float64)])


# Changes of the bytes of a file: the place as a share of its length, the kind of change, and the new bytes.
byte_changes = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "drop"]), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def apply_changes(data, steps):
    """The bytes ``data`` after a list of changes, one after the other."""
    for where, how, new in steps:
        at = int(where * (len(data) - 1))
        if how == "flip":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at + len(new) :]
        if not data:
            break
    return data


def gram_of(trajectories):
    """The inner products of collected features."""
    gram = GramMatrix(trajectories.num_steps)
    for features in trajectories.batches(trajectories.samples):
        for step in range(trajectories.num_steps):
            gram.update(step, features[:, step])
    return gram
