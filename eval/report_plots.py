"""The plots of a comparison: one colour and one marker per arm, the same in every plot."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trueup.eval.compare_samples import BASELINE
from trueup.eval.pages import COLOURS, GREY, MARKERS, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]
Style = Mapping[str, tuple[str, str]]  # arm -> (colour, marker)


# (name, label, factor) of the text figures that are worth a panel
TEXT = (
    ("completions/mean_length", "length, tokens", 1),
    ("distinct_2", "distinct 2-grams, %", 100),
    ("repetition", "repeated 4-grams, %", 100),
    ("longest_repeat", "longest repeat, tokens", 1),
    ("eos_rate", "ended by itself, %", 100),
    ("entropy", "entropy, nats per token", 1),
)


def styles(names: Sequence[str]) -> Style:
    """A colour and a marker for each arm; the baseline is grey."""
    others = [name for name in names if name != BASELINE]
    found = {
        name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
        for place, name in enumerate(others)
    }
    return {BASELINE: (GREY, "o"), **found}


# ------------------------------------------------------------------------------------------------ win rates


def win_rates(verdict: Json) -> "Figure":
    """Every pair: the win rate with its interval, each seed, and the rate at equal length."""
    pairs = verdict["pairs"]
    style = styles([arm["name"] for arm in verdict["arms"]])
    with panels(1, 1, 1.0 + 0.42 * len(pairs)) as (figure, (axes,)):
        for place, pair in enumerate(pairs):
            colour, marker = style[pair["a"]]
            _whisker(axes, pair["rate"], place, colour, marker)
            controlled = pair["length_controlled"]["estimate"]
            axes.plot([100 * controlled], [place + 0.22], "|", color=colour, ms=9, mew=2)
            if len(pair["by_seed"]) > 1:
                seeds = [100 * rate for rate in pair["by_seed"]]
                axes.plot(seeds, [place - 0.22] * len(seeds), ".", color=colour, ms=4, alpha=0.7)
        axes.axvline(50, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(pairs)), [f"{pair['a']} over {pair['b']}" for pair in pairs])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(
            title="Win rate, ties half",
            xlabel="%   (bar: 95 % interval; dots above: seeds; tick below: at equal length)",
        )
    return figure


def _whisker(axes: "Axes", interval: Json, place: float, colour: str, marker: str) -> None:
    low, middle, high = (100 * interval[name] for name in ("low", "estimate", "high"))
    axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
    axes.plot([middle], [place], marker, color=colour, ms=7)


def ratings(verdict: Json) -> "Figure":
    """Bradley-Terry strengths on the scale of Elo, with intervals; the baseline is 0."""
    rated = [arm for arm in verdict["arms"] if arm["elo"] is not None]
    arms = sorted(rated, key=lambda arm: -arm["elo"])
    style = styles([arm["name"] for arm in verdict["arms"]])
    with panels(1, 1, 1.0 + 0.42 * len(arms)) as (figure, (axes,)):
        for place, arm in enumerate(arms):
            colour, marker = style[arm["name"]]
            rating = {name: 4 / math.log(10) * value for name, value in arm["bradley_terry"].items()}
            _whisker(axes, rating, place, colour, marker)
        axes.axvline(0, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title="Bradley-Terry rating", xlabel="points of Elo above the baseline, 95 % interval")
    return figure


# ------------------------------------------------------------------------------------------------ frontier


def frontier(verdict: Json, traces: Sequence[Json]) -> "Figure":
    """Reward against the root of the KL: runs as lines of checkpoints, the arms on the test prompts as large
    marks; what ranks, and the proxy if there is one."""
    style = styles([arm["name"] for arm in verdict["arms"]])
    ranking = f"scorers/{verdict['scorers'][0]}"
    wanted = [("score", ranking, f"{verdict['scorers'][0]} (ranks)")]
    if "proxy" in verdict["arms"][0]["means"]:
        wanted.append(("proxy", "proxy", "the proxy (shown, never ranks)"))
    with panels(1, len(wanted), 4.4) as (figure, every):
        for axes, (name, measure, title) in zip(every, wanted, strict=True):
            for trace in traces:
                _trace(axes, trace, name, style[trace["arm"]])
            if name == "score":
                _humps(axes, traces, style)
            for arm in verdict["arms"]:
                if measure in arm["means"] and arm["kl"]["per_sequence"] is not None:
                    _end_point(axes, arm, measure, style[arm["name"]])
            axes.set(title=title, xlabel="√KL from the baseline, √nats", ylabel="mean score")
        every[0].legend(fontsize=8, loc="best", framealpha=0.8)
    return figure


def _trace(axes: "Axes", trace: Json, name: str, style: tuple[str, str]) -> None:
    colour, marker = style
    known = [point for point in trace["points"] if point[name] is not None]
    roots = [math.sqrt(max(point["kl"], 0.0)) for point in known]
    axes.plot(roots, [point[name] for point in known], marker=marker, color=colour, ms=3, lw=1, alpha=0.55)


def _humps(axes: "Axes", traces: Sequence[Json], style: Style) -> None:
    """A ring around each, and one word per arm."""
    named = set()
    for trace in (trace for trace in traces if trace["hump"]):
        place = (math.sqrt(max(trace["hump"]["kl"], 0.0)), trace["hump"]["score"])
        colour, _ = style[trace["arm"]]
        axes.plot(*([one] for one in place), "o", ms=13, mfc="none", mec=colour, mew=1.6)
        if trace["arm"] not in named:
            axes.annotate("hump", place, (0, -18), textcoords="offset points", ha="center", fontsize=8)
        named.add(trace["arm"])


def _end_point(axes: "Axes", arm: Json, measure: str, style: tuple[str, str]) -> None:
    colour, marker = style
    mean, kl = arm["means"][measure], arm["kl"]
    root = math.sqrt(max(kl["per_sequence"], 0.0))
    reach = [[mean["estimate"] - mean["low"]], [mean["high"] - mean["estimate"]]]
    label = f"{arm['name']} (bound of KL)" if kl["bound"] else arm["name"]
    face = "none" if kl["bound"] else colour
    axes.errorbar(
        [root], [mean["estimate"]], yerr=reach, fmt=marker, color=colour, mfc=face, ms=9, lw=1.5, label=label
    )


# ------------------------------------------------------------------------------------------------ parts, text


def parts(verdict: Json) -> "Figure":
    """Each part of the gold score by arm: how often it was right, with intervals."""
    names = [name for name in verdict["arms"][0]["means"] if name.startswith("parts/")]
    rows = [
        (name.removeprefix("parts/"), {a["name"]: a["means"][name] for a in verdict["arms"]})
        for name in names
    ]
    return _dots(verdict, rows, "Each part of the gold score", "% of answers, 95 % interval")


def families(verdict: Json) -> "Figure":
    """Correct answers by family of prompts and arm."""
    found = {arm["name"]: arm["correct_by_family"] for arm in verdict["arms"]}
    rows = [(name, {arm: by[name] for arm, by in found.items()}) for name in found[BASELINE]]
    return _dots(verdict, rows, "Correct answers by family", "% of answers, 95 % interval")


def _dots(verdict: Json, rows: Sequence[tuple[str, Mapping[str, Json]]], title: str, unit: str) -> "Figure":
    style = styles([arm["name"] for arm in verdict["arms"]])
    height = 1.3 + len(rows) * (0.16 + 0.11 * len(style))
    with panels(1, 1, height) as (figure, (axes,)):
        for row, (_, intervals) in enumerate(rows):
            for place, (arm, interval) in enumerate(intervals.items()):
                colour, marker = style[arm]
                at = row + 0.7 * ((place + 0.5) / len(intervals) - 0.5)
                low, middle, high = (100 * interval[name] for name in ("low", "estimate", "high"))
                axes.plot([low, high], [at, at], color=colour, lw=1.5)
                axes.plot([middle], [at], marker, color=colour, ms=5, label=arm if row == 0 else None)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title=title, xlabel=unit)
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def text(verdict: Json) -> "Figure":
    """What goes wrong in text: one panel per figure, one row per arm, one dot per seed."""
    style = styles([arm["name"] for arm in verdict["arms"]])
    with panels(2, 3, 2.2 + 0.36 * len(style)) as (figure, every):
        for number, (axes, (name, label, factor)) in enumerate(zip(every, TEXT, strict=True)):
            for place, arm in enumerate(verdict["arms"]):
                colour, marker = style[arm["name"]]
                seeds = [factor * one[name] for one in arm["text_by_seed"] if name in one]
                axes.plot(seeds, [place] * len(seeds), marker, color=colour, ms=5, alpha=0.7)
            shown = [arm["name"] for arm in verdict["arms"]] if number % 3 == 0 else [""] * len(style)
            axes.set_yticks(range(len(style)), shown)
            axes.set_ylim(len(style) - 0.4, -0.6)
            axes.set_title(label, fontsize=9, fontweight="normal")
            low, high = axes.get_xlim()
            reach = max(high - low, 0.04 * abs(low + high), 0.1) * 0.55  # what hardly differs is to look so
            most = 100 + 0.05 * reach if factor == 100 else math.inf  # of a share there is no more
            axes.set_xlim((low + high) / 2 - reach, min((low + high) / 2 + reach, most))
            axes.locator_params(axis="x", nbins=5)
    return figure
