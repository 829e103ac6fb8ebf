"""The Gram matrix of what cache-dit predicts, so that a forecaster can be fitted to it."""

from typing import Any, Literal

from torch import Tensor

from lesa.adapters.cache_dit.compat import CalibratorBase, CalibratorConfig, install
from lesa.statistics.gram import GramMatrix


class SharedGram(GramMatrix):
    """One matrix for all calibrators of a configuration, although cache-dit deep-copies it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGram":
        return self


class GramCalibrator(CalibratorBase):
    """Measures every tensor that cache-dit would predict, while all steps are full."""

    def __init__(self, gram: SharedGram) -> None:
        self._gram = gram
        self._streams: dict[str, GramMatrix] = {}
        self._step = -1

    def reset_cache(self, *args: Any, **kwargs: Any) -> None:
        self._streams.clear()
        self._step = -1

    def mark_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step += 1

    def update(self, Y: Tensor, name: str = "default") -> None:  # noqa: N803
        stream = self._streams.setdefault(name, GramMatrix(self._gram.num_steps))
        stream.update(self._step, Y)
        if self._step == self._gram.num_steps - 1:
            self._gram.merge(self._streams.pop(name))

    def approximate(self, name: str = "default") -> Tensor:
        raise RuntimeError(
            f"step {self._step} is to be predicted while features are measured: run all of them in full with "
            f"DBCacheConfig(steps_computation_mask=[1] * {self._gram.num_steps})"
        )


class GramConfig(CalibratorConfig):
    """A calibrator that predicts nothing and measures: ``lesa.LeastSquares(config.gram)`` is fitted to the result.

    Every step has to be full. All that cache-dit would predict, of the image and the text and of every branch, is
    counted in one matrix, so it has to be enabled with the settings that are used afterwards.

    Args:
        num_steps: of the generations.
        enable_encoder_calibrator: also count the text stream.
        calibrator_cache_type: what will be predicted, ``"residual"`` or ``"hidden_states"``.

    Attributes:
        gram: the :class:`lesa.GramMatrix`; a generation is counted at its last step.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        enable_encoder_calibrator: bool = True,
        calibrator_cache_type: Literal["residual", "hidden_states"] = "residual",
    ) -> None:
        install("lesa-gram", GramCalibrator)
        self.gram: GramMatrix = SharedGram(num_steps)
        super().__init__(
            enable_calibrator=True,
            enable_encoder_calibrator=enable_encoder_calibrator,
            calibrator_type="lesa-gram",
            calibrator_cache_type=calibrator_cache_type,
            calibrator_kwargs={"gram": self.gram},
        )

    def strify(self, **kwargs: Any) -> str:
        """Its name in the log and summary of cache-dit."""
        return f"lesa.GramMatrix({self.gram.num_steps})"
