"""The record of a training run: rows of figures as JSON lines, its speed, and the loss curve as a picture."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any


class TrainingLog:
    """`log.jsonl`: a row per report. One that is resumed at a step forgets what came after it."""

    def __init__(self, path: Path, step: int, main: bool):
        self.path, self.main = path, main
        self.rows = [row for row in _read(path) if row["step"] <= step]
        self._tokens, self._seconds = 0, 0.0
        if main:
            path.write_text("".join(map(_line, self.rows)), encoding="utf-8")

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Append a row; what is no number (an overflown gradient) is null."""
        row = {"step": step} | {name: _finite(value) for name, value in figures.items()}
        self.rows.append(row)
        if self.main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def spent(self, tokens: int, seconds: float) -> None:
        """A step took so long."""
        self._tokens += tokens
        self._seconds += seconds

    def speed(self) -> float:
        """Tokens per second since the last call: steps only, not evaluation or checkpoints."""
        speed = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        return speed

    def newest(self) -> dict[str, float]:
        """The last value of every figure."""
        merged: dict[str, Any] = {}
        for row in self.rows:
            merged |= row
        return {name: value for name, value in merged.items() if isinstance(value, int | float)}


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the last line of a run that was killed
            rows.append(json.loads(line))
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_curve(rows: list[dict[str, Any]], path: Path, floor: float | None = None) -> None:
    """Loss in training and held out, and held-out bits per byte where measured, over the steps, as a PNG.

    Args:
        rows: events with `step` and `loss`, `eval_loss` or `bits_per_byte`.
        floor: the entropy of the text in bits per byte, where it is known.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    losses.plot(*series("loss"), lw=1, label="training loss")
    if series("eval_loss")[0]:
        losses.plot(*series("eval_loss"), "o-", ms=3, color="tab:orange", label="held-out loss")
    if series("bits_per_byte")[0]:
        bits = losses.twinx()
        bits.plot(*series("bits_per_byte"), "o-", ms=3, color="tab:orange", label="held-out bits per byte")
        bits.set_ylabel("held-out bits per byte")
        if floor is not None:
            bits.axhline(floor, ls="--", lw=1, color="tab:gray", label="entropy of the text")
    losses.set(xlabel="step", ylabel="loss, nats per token")
    if min([*series("loss")[1], *series("eval_loss")[1], 1]) > 0:  # a policy gradient's may not be
        losses.set_yscale("log")  # the first steps dwarf the rest
    losses.yaxis.set_major_locator(MaxNLocator(6))
    losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.minorticks_off()
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120, format="png")
