"""The driver that only watches: every step runs in full and its feature is handed on."""

from collections.abc import Callable

from torch import Tensor

from lesa.runtime.driver import Call, Session

OnFeature = Callable[[Call, Tensor], None]


class Observer:
    """Calls ``on_feature(call, feature)`` for the feature that enters the head at every step."""

    def __init__(self, on_feature: OnFeature) -> None:
        self._on_feature = on_feature
        self._call: Call | None = None

    def begin(self, call: Call) -> bool:
        self._call = call
        return False

    def keep(self, head: str, feature: Tensor) -> None:
        if self._call is not None:
            self._on_feature(self._call, feature.detach())

    def predict(self, head: str) -> Tensor:
        raise AssertionError("an observer never skips a step")

    def coming(self, head: str) -> None:
        return None

    def end(self, *, failed: bool) -> None:
        self._call = None

    def reset(self, session: Session | None = None) -> None:
        self._call = None
