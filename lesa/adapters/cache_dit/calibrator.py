"""The calibrator: cache-dit says which steps are full, a forecaster what the others are."""

from typing import Any

from torch import Tensor

from lesa.adapters.cache_dit.compat import CalibratorBase
from lesa.adapters.cache_dit.tables import Tables
from lesa.runtime.history import FeatureHistory


class Stream:
    """One tensor that cache-dit predicts, such as the residual of a list of blocks, through one generation.

    A forecaster needs only the full steps before a step, so at each new one the table is made again for the plan that
    has been seen so far, and the kept features are taken over.
    """

    def __init__(self, tables: Tables, times: Tensor) -> None:
        self._tables = tables
        self._times = times
        self._full: list[int] = []
        self._history: FeatureHistory | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the kept features."""
        return 0 if self._history is None else self._history.nbytes

    def keep(self, step: int, feature: Tensor) -> None:
        """Take the feature of a full step, by copy."""
        self._full.append(step)
        table = self._tables.table(self._full, self._times)
        self._history = FeatureHistory(table, previous=self._history)
        self._history.keep(step, feature)

    def predict(self, step: int) -> Tensor:
        """The prediction of a step, [*feature]."""
        if self._history is None or not self._history.can_predict(step):
            raise RuntimeError(
                f"step {step} cannot be predicted from the full steps {self._full}: "
                f"{self._tables.forecaster!r} needs an earlier one whose feature it had let go"
            )
        return self._history.predict(step)


class ForecasterCalibrator(CalibratorBase):
    """What cache-dit calls: ``mark_step_begin`` at every step, then ``update`` at a full one or ``approximate``.

    cache-dit makes one for each list of blocks and branch of guidance, and calls it by the names of its tensors.

    Raises:
        ValueError: for more steps than the schedule has.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._streams: dict[str, Stream] = {}
        self._times: Tensor | None = None
        self._step = -1

    def reset_cache(self, *args: Any, **kwargs: Any) -> None:
        self._streams.clear()
        self._times = None
        self._step = -1

    def mark_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._times is None:
            start, self._times = self._tables.begin()
            self._step = start - 1
        self._step += 1
        if self._step >= len(self._times) - 1:
            raise ValueError(
                f"cache-dit counts a step {self._step} on a schedule of {len(self._times) - 1} steps; where the "
                "transformer alone is cached, it has to be told how many there are: "
                f"DBCacheConfig(num_inference_steps={len(self._times) - 1})"
            )

    def update(self, Y: Tensor, name: str = "default") -> None:  # noqa: N803
        assert self._times is not None, "mark_step_begin comes first"
        if name not in self._streams:
            self._streams[name] = Stream(self._tables, self._times)
        self._streams[name].keep(self._step, Y.detach())

    def approximate(self, name: str = "default") -> Tensor:
        return self._streams[name].predict(self._step)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept features."""
        return sum(stream.nbytes for stream in self._streams.values())

    def __repr__(self) -> str:
        return f"ForecasterCalibrator({self._tables.forecaster!r})"
