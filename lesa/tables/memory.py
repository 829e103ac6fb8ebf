"""The contract of a memory: it keeps the features of one head in one generation and predicts from them."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from lesa.tables.substeps import Substeps


class IntervalPrediction(NamedTuple):
    """The predictions of all steps until the next full one, or of the substeps of one step, before they are combined.

    Attributes:
        steps: consecutive predicted steps, from the current one on.
        history: kept features [m, *feature].
        coefficients: [steps, m] float32 (float64 for float64 features), on the device of the features.
        bias: [steps], as the coefficients; None: zeros.
        means: [m, *feature without channels] float32, the channel mean of each token of each feature, if kept.
        centred: those means have been subtracted from the features.
        weights: [steps], as the coefficients: the outputs are added up with these; None: each is an output of its own.
        substeps: the schedule that ``steps`` count in, if steps are divided.
    """

    steps: list[int]
    history: Tensor
    coefficients: Tensor
    bias: Tensor | None
    means: Tensor | None = None
    centred: bool = False
    weights: Tensor | None = None
    substeps: Substeps | None = None


class Memory(ABC):
    """Keeps the features of one head and predicts from them."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Features that are kept at once, at most."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are held; 0 before the first feature."""

    @abstractmethod
    def keep(self, step: int, feature: Tensor) -> None:
        """Copy the feature [*feature] of a full step.

        Raises:
            ValueError: if it is not floating-point, or has another shape than the features before it.
        """

    @abstractmethod
    def can_predict(self, step: int) -> bool:
        """Whether every feature that the prediction of ``step`` needs has been kept."""

    @abstractmethod
    def predict(self, step: int) -> Tensor:
        """The prediction of ``step``, [*feature].

        Raises:
            ValueError: if a feature that it needs has not been kept.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop the features and free their memory."""

    def predict_interval(self, step: int) -> IntervalPrediction | None:
        """The predictions of ``step`` and of the steps until the next full one; None: they are made one by one."""
        return None

    def prediction_error(self, step: int, feature: Tensor) -> Tensor | None:
        """How good the prediction of a full step would have been; call it before the true ``feature`` is kept.

        Returns:
            float64 [2] on the device: squared error, and squared size of the true feature. None: it cannot be told.
        """
        return None


class SubstepMemory(Memory):
    """A memory of steps that are divided into substeps. :meth:`predict` gives the mean feature over a step.

    Attributes:
        substeps: the fine schedule.
        correction, output_share: as in :class:`lesa.Forecaster`.
    """

    substeps: Substeps
    correction: float
    output_share: float

    @abstractmethod
    def predict_rest(self, step: int) -> IntervalPrediction | None:
        """After the full step ``step``: its substeps but the first, which has run; None: there are no others."""

    @abstractmethod
    def interpolate(self, step: int) -> IntervalPrediction | None:
        """After the full step ``step``: the substeps since the full step before, interpolated between the two features.

        The weights are the lengths of the substeps. None: there is nothing to correct.
        """

    @abstractmethod
    def mean(self, step: int) -> tuple[Tensor | None, float]:
        """Before the full step ``step``: the mean feature over it, as :meth:`lesa.runtime.driver.Driver.mean`."""
