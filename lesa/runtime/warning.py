"""What a generation warns with."""

import sys
import warnings


class LesaWarning(UserWarning):
    """Something runs, but not as fast or as well as was asked for."""


class Warnings:
    """Says each thing once, and remembers it.

    Python shows a warning of the same text and place once a process, so that the second of two handles would be silent;
    here each handle says what is true of it.

    Attributes:
        said: what has been said, in order.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, text: str) -> None:
        """Warn with a :class:`LesaWarning`, unless this has been said."""
        if text not in self.said:
            self.said.append(text)
            frame = sys._getframe(1)
            warnings.warn_explicit(text, LesaWarning, frame.f_code.co_filename, frame.f_lineno, registry={})
