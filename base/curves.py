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
    """Training loss, and held-out bits per byte where it was measured, over the steps, as a PNG.

    Args:
        rows: of a TrainingLog, with `loss` or `bits_per_byte`.
        floor: the entropy of the text in bits per byte, where it is known.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    train = [row for row in rows if row.get("loss") is not None]
    losses.plot([row["step"] for row in train], [row["loss"] for row in train], lw=1, label="training loss")
    losses.set_xlabel("step")
    losses.set_ylabel("training loss, nats per token")
    held_out = [row for row in rows if "bits_per_byte" in row]
    steps, measured = [row["step"] for row in held_out], [row["bits_per_byte"] for row in held_out]
    bits = losses.twinx()
    bits.plot(steps, measured, "o-", ms=3, color="tab:orange", label="held-out bits per byte")
    bits.set_ylabel("held-out bits per byte")
    if floor is not None:
        bits.axhline(floor, ls="--", lw=1, color="tab:gray", label="entropy of the text")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120, format="png")
