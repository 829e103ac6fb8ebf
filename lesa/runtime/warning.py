"""What a generation warns with."""


class LesaWarning(UserWarning):
    """Something runs, but not as fast or as well as was asked for."""
