"""The shape of a LESA predictor."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lesa.arguments import real, whole

# Upper bounds, so that a damaged config.json cannot ask for any amount of memory. The paper has 50, 256, 8, 4 and 5.
MOST = {
    "num_steps": 10_000,
    "hidden_dim": 1 << 14,
    "history": 1 << 10,
    "first_history": 1 << 10,
    "grid_size": 1 << 10,
}


@dataclass(frozen=True)
class LesaConfig:
    """The shape of a :class:`lesa.LesaPredictor`.

    Args:
        num_steps: steps of the schedule; the gates see one offset for each, and one for the final time.
        hidden_dim: width of the two hidden layers of a gate.
        history: features that the stages after the first look back on.
        boundaries: times that separate the stages, falling; a step at time t is in the first stage with t above it.
            The paper has (0.9, 0.5) for FLUX and (0.9, 0.4) for Qwen-Image.
        first_history: features that the first stage looks back on; None: half of ``history``, as in the paper.
        grid_size, spline_order, grid_range: the splines of the gates.
        latent: ``"linear"`` as in the paper, or ``"kan"``: window weights and a spline on every feature of the window.
            Such a predictor is not a linear combination of full features, so it has no table.

    Raises:
        ValueError: for sizes below one, or boundaries that do not fall within (0, 1).
    """

    num_steps: int
    hidden_dim: int = 256
    history: int = 8
    boundaries: tuple[float, ...] = (0.9, 0.5)
    first_history: int | None = None
    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-3.0, 3.0)
    latent: Literal["linear", "kan"] = "linear"

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if name != "first_history" or self.first_history is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least=1, most=most))
        whole("spline_order", self.spline_order, least=0, most=MOST["grid_size"])
        low, high = _numbers("grid_range", self.grid_range, 2)
        if not low < high:
            raise ValueError(f"grid_range must rise, not {low:g} to {high:g}")
        object.__setattr__(self, "boundaries", _numbers("boundaries", self.boundaries))
        object.__setattr__(self, "grid_range", (low, high))
        if self.latent not in ("linear", "kan"):
            raise ValueError(f"latent must be 'linear' or 'kan', not {self.latent!r}")
        falling = all(a > b for a, b in zip((1.0, *self.boundaries), (*self.boundaries, 0.0), strict=True))
        if not falling:
            raise ValueError(f"boundaries must fall within (0, 1), not {self.boundaries}")

    @property
    def windows(self) -> tuple[int, ...]:
        """The window length of each stage."""
        first = max(1, self.history // 2) if self.first_history is None else self.first_history
        return (first, *(self.history for _ in self.boundaries))

    @property
    def gate_widths(self) -> list[int]:
        """The layer widths of a gate: an input for each time of the schedule and for its end, one output."""
        return [self.num_steps + 1, self.hidden_dim, self.hidden_dim, 1]

    def stage(self, time: float) -> int:
        """The stage of a step at ``time``."""
        return sum(time <= boundary for boundary in self.boundaries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a predictor's weights, by their names in ``state_dict``."""
        bases = self.grid_size + self.spline_order
        shapes: dict[str, tuple[int, ...]] = {}
        for stage, window in enumerate(self.windows):
            shapes |= {f"latent.{stage}.weight": (1, window), f"latent.{stage}.bias": (1,)}
            if self.latent == "kan":
                shapes |= {
                    f"latent.{stage}.base_weight": (window,),
                    f"latent.{stage}.spline_weight": (window, bases),
                }
            for layer, (inputs, outputs) in enumerate(itertools.pairwise(self.gate_widths)):
                name = f"timestep.{stage}.layers.{layer}"
                shapes |= {
                    f"{name}.base_weight": (outputs, inputs),
                    f"{name}.spline_weight": (outputs, inputs, bases),
                    f"{name}.spline_scaler": (outputs, inputs),
                    f"{name}.grid": (inputs, bases + self.spline_order + 1),
                }
        return shapes

    def check_shapes(self, given: Mapping[str, tuple[int, ...]]) -> None:
        """Check the shapes of weights in a file before any memory is allocated for them.

        Raises:
            ValueError: if one is missing, unknown or of another shape.
        """
        expected = self.shapes
        if missing := sorted(expected.keys() - given.keys()):
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        if unknown := sorted(given.keys() - expected.keys()):
            raise ValueError(f"{len(unknown)} weights are none of a LESA predictor's, such as {unknown[0][:80]!a}")
        for name, shape in expected.items():
            if tuple(given[name]) != shape:
                raise ValueError(f"{name} is {list(given[name])}, where this configuration has {list(shape)}")


def _numbers(name: str, values: Any, count: int | None = None) -> tuple[float, ...]:
    """Finite numbers, as many as wanted."""
    if not isinstance(values, Sequence) or isinstance(values, str) or (count is not None and len(values) != count):
        raise ValueError(f"{name} must be {'numbers' if count is None else f'{count} numbers'}, not {values!r:.80}")
    return tuple(real(f"each of {name}", value) for value in values)
