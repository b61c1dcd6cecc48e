"""Progress of a training loop: a bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows where training is. Silent on all processes but the main one.

    On a terminal a bar with the newest figures, ETA included; elsewhere a line whenever figures are reported.
    """

    def __init__(self, title: str, total: int, first: int, main: bool):
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)
        self.total, self.first, self.started = total, first, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not (main and self.console.is_terminal),
        )
        self.task = self.bar.add_task(title, total=total, completed=first, figures="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        sys.stdout.flush()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self.bar.update(self.task, completed=step)

    def report(self, step: int, figures: dict[str, Any]) -> None:
        """New figures of the training steps."""
        text = "  ".join(f"{name} {show(value)}" for name, value in figures.items())
        self.bar.update(self.task, figures=text)
        if self.bar.disable:
            self.say(f"step {step}/{self.total}  {text}  ETA {self._remaining(step)}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False)
        sys.stdout.flush()

    def _remaining(self, step: int) -> str:
        per_step = (time.monotonic() - self.started) / max(1, step - self.first)
        minutes, seconds = divmod(round(per_step * (self.total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def show(value: Any) -> str:
    """A figure in a few characters: 0.003, 3.4142, 21,504."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
