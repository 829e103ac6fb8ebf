"""The statistics of one stream of a calibration."""

from dataclasses import dataclass, field

from torch import Tensor

from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import OutputErrorGram
from lesa.tables.times import TOLERANCE, same_times


@dataclass
class Measured:
    """Inner products of the features of one stream, and of their output errors where the output head is known.

    A stream may take part in some steps of the schedule only, from ``first`` on: a second transformer, guidance that
    ends early.
    """

    gram: GramMatrix
    output_errors: OutputErrorGram | None = None
    first: int = 0
    _of_features: tuple[Tensor, int, OutputErrorGram] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def errors(self) -> OutputErrorGram:
        """The output errors, or else those of the features."""
        if self.output_errors is not None:
            return self.output_errors
        matrix = self.gram.matrix
        if self._of_features is None or self._of_features[:2] != (matrix, matrix._version):
            self._of_features = matrix, matrix._version, OutputErrorGram.from_gram(self.gram)
        return self._of_features[2]

    def errors_at(self, times: Tensor, schedule: Tensor) -> OutputErrorGram:
        """Errors at ``times`` [steps + 1], for a stream that was measured on ``schedule`` [calibrated steps + 1].

        Raises:
            ValueError: if the errors cannot be interpolated at these times.
        """
        if same_times(times, schedule):
            return self.errors.within(self.first, len(schedule) - 1)
        steps, first = self.gram.num_steps, self.first
        own = schedule[first : first + steps + 1]
        if steps == len(schedule) - 1:
            return self.errors.at(own, times)
        near = (times[:-1] <= own[0] + TOLERANCE) & (times[:-1] >= own[-2] - TOLERANCE)
        inside = near.nonzero().flatten()
        if not len(inside):
            return OutputErrorGram.empty(len(times) - 1)
        begin, end = int(inside[0]), int(inside[-1]) + 1
        return self.errors.at(own, times[begin : end + 1]).within(begin, len(times) - 1)

    def merge(self, other: "Measured") -> None:
        """Add what was measured on other samples; both have the same steps, with or without output errors."""
        self.gram.merge(other.gram)
        if self.output_errors is not None and other.output_errors is not None:
            self.output_errors.merge(other.output_errors)

    @property
    def state(self) -> tuple[int, ...]:
        """Changes when something is merged or replaced."""
        held = [self.gram.matrix, *([] if self.output_errors is None else [self.output_errors.vectors])]
        return tuple(number for matrix in held for number in (id(matrix), matrix._version))
