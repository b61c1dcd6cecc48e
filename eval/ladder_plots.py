"""The plots of pretraining runs held against each other: their curves, and how learning rates transfer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trueup.eval.ladder_runs import LOG, RunGroup
from trueup.eval.pages import COLOURS, GREY, MARKERS, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

FIRST = 100  # steps that are "the start"
MOST_CURVES = 7  # more cannot be told apart
LINE = 0.055  # of a panel's height: a line of small print
INITS = {"gpt2": "Standard parametrisation", "mup": "muP"}


def read_logs(group: RunGroup) -> dict[str, Rows]:
    """The log of each run that has one, the baseline's first."""
    names = sorted(group.runs, key=lambda run: (run.name != group.baseline, run.name))
    paths = {run.name: Path(run.path) / LOG for run in names}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
        if path.exists()
    }


def curves(group: RunGroup, logs: Mapping[str, Rows]) -> "Figure":
    """Training loss and held-out bits per byte, over all steps."""
    floored = all(run.above_floor is not None for run in group.runs)
    with panels(1, 2, 4.2) as (figure, (losses, bits)):
        _lines(losses, group, logs, "loss", lw=0.8)
        losses.set(title="Training loss", xlabel="step", ylabel="nats per token", xscale="log")
        _label(
            bits, _lines(bits, group, logs, "above_floor" if floored else "bits_per_byte", marker="o", ms=3)
        )
        title = "Held-out bits per byte" + floored * " above the entropy"
        bits.set(title=title, xlabel="step")
    return figure


def start(group: RunGroup, logs: Mapping[str, Rows]) -> "Figure":
    """Training loss and gradient norm of the first steps."""
    first = {name: [row for row in rows if row["step"] <= FIRST] for name, rows in logs.items()}
    with panels(1, 2, 4.2) as (figure, (losses, norms)):
        _lines(losses, group, first, "loss")
        losses.set(title="Training loss at the start", xlabel="step", ylabel="nats per token")
        _label(norms, _lines(norms, group, first, "grad_norm"))
        norms.set(title="Norm of the gradient at the start", xlabel="step")
    return figure


def transfer(group: RunGroup) -> "Figure":
    """Held-out bits per byte over the learning rate: a panel for each way to begin, a line for each width."""
    inits = sorted({run.init for run in group.runs})
    rates = sorted({run.learning_rate for run in group.runs})
    ends: dict[str, list[End]] = {}
    with panels(1, len(inits), 4.2) as (figure, every):
        for axes, init in zip(every, inits, strict=True):
            if axes is not every[0]:
                axes.sharey(every[0])
            ends[init] = list(_width_lines(axes, group, init))
            axes.set(title=INITS.get(init, init), xlabel="learning rate", xscale="log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.minorticks_off()
            _plain_log(axes)
        for axes, init in zip(every, inits, strict=True):  # when it is known how far the panels reach
            _label(axes, ends[init])
        every[0].set_ylabel("held-out bits per byte")
    return figure


def _width_lines(axes: "Axes", group: RunGroup, init: str) -> Iterator["End"]:
    for place, width in enumerate(sorted({run.width for run in group.runs})):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        if points := _by_rate(group, init, width):
            best = min(points, key=lambda point: point[1])
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, lw=1.6, ms=5)
            axes.plot(*([one] for one in best), "o", ms=13, mfc="none", mec=colour, mew=1.6)
            yield End(f"width {width}", *points[-1], colour)


def _by_rate(group: RunGroup, init: str, width: int) -> list[tuple[float, float]]:
    """(learning rate, mean bits per byte of the runs with it), in order."""
    found: dict[float, list[float]] = {}
    for run in group.runs:
        if (run.init, run.width) == (init, width):
            found.setdefault(run.learning_rate, []).append(run.bits_per_byte)
    return [(rate, sum(bits) / len(bits)) for rate, bits in sorted(found.items())]


# ---------------------------------------------------------------------------------------- lines and labels


class End(NamedTuple):
    """Where a line ends, and what it is called."""

    name: str
    x: float
    y: float
    colour: str


def _lines(
    axes: "Axes", group: RunGroup, logs: Mapping[str, Rows], figure: str, lw: float = 1.4, **style: Any
) -> list[End]:
    """A line for each run that logged a figure, on a log axis."""
    colours = iter(COLOURS)
    ends = []
    for name, rows in logs.items():
        colour = GREY if name == group.baseline else next(colours)
        points = [(row["step"], row[figure]) for row in rows if row.get(figure) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=lw, **style)
            ends.append(End(name, *points[-1], colour))
    _plain_log(axes)
    return ends


def _plain_log(axes: "Axes") -> None:
    """A log axis up, with plain numbers, also where it spans much less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high / low > 5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)) if wide else MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _label(axes: "Axes", ends: Sequence[End]) -> None:
    """Name each line where it ends, right of the panel, none over another."""
    axes.autoscale_view()  # otherwise done when it is drawn
    within = axes.transData + axes.transAxes.inverted()
    found = sorted(((within.transform((end.x, end.y))[1], end) for end in ends), key=lambda pair: pair[0])
    places: list[float] = []
    for at, _ in found:
        places.append(max(at, places[-1] + LINE) if places else at)
    for place in reversed(range(len(places))):  # those pushed out above come down again
        above = places[place + 1] if place + 1 < len(places) else 1 + LINE
        places[place] = min(places[place], above - LINE)
    for at, (_, end) in zip(places, found, strict=True):
        axes.annotate(
            end.name, (end.x, end.y), (1.04, at), textcoords="axes fraction", color=end.colour, fontsize=8.5,
            va="center", arrowprops={"arrowstyle": "-", "color": end.colour, "lw": 0.6},
        )  # fmt: skip
