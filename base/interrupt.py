"""Being asked to stop: SIGTERM (a scheduler) and SIGINT (Ctrl-C) wait for a place where nothing is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from trueup.recipes.errors import TrueupError


class Interrupted(TrueupError):
    """The run was asked to stop and has saved its work. Exit code 128 + signal, as shells count: 130, 143."""

    def __init__(self, number: int, step: int, total: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step} of {total}; a checkpoint was "
            "written: run the same command again to go on from there"
        )
        self.exit_code = 128 + number


class StopRequest:
    """While the block runs, the first SIGTERM or SIGINT only sets `number`; a second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
