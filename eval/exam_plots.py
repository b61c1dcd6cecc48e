"""The exam of a reward model as a page of plots, drawn from its JSON alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.eval.pages import COLOURS, GREY
from trueup.recipes.directory import atomic_file, write_json, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]

BLUE, ORANGE = COLOURS[:2]


def save_exam(report: Report, directory: Path) -> Path:
    """Write `eval/exam.json` and `eval/exam.png` into a model directory; returns the JSON's path."""
    path = directory / "eval" / "exam.json"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path.with_suffix(".png")) as temporary:
            draw(report, temporary)
    write_json(path, report)
    return path


def draw(report: Report, path: Path) -> None:
    """Six panels, as a PNG: is it right, how sure may one be, and what is it looking at."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, axes in zip(
        (_scores, _reliability, _margins, _changes, _lengths, _agreement), panels, strict=True
    ):
        panel(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
    right = report["accuracy"]
    figure.suptitle(
        f"{report['model']}: right on {right['estimate']:.1%} of {report['pairs']:,} held-out pairs "
        f"(95 % interval {right['low']:.1%} to {right['high']:.1%})"
    )
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _scores(axes: "Axes", report: Report) -> None:
    found = report["scores"]
    axes.stairs(found["chosen"], found["edges"], fill=True, alpha=0.35, color=BLUE, label="chosen")
    axes.stairs(found["rejected"], found["edges"], color=ORANGE, lw=2, label="rejected")
    axes.set(title="Scores", xlabel="score", ylabel="replies")
    axes.legend(frameon=False)


def _reliability(axes: "Axes", report: Report) -> None:
    bins = report["reliability"]["bins"]
    axes.plot([0.5, 1], [0.5, 1], "--", color=GREY, lw=1, label="as sure as right")
    _with_intervals(axes, [one["probability"] for one in bins], bins, BLUE, "o-", "bins of pairs")
    axes.set(
        title=f"Reliability: off by {report['reliability']['ece']:.1%} (ECE)",
        xlabel="probability it gives: sigmoid of the score difference",
        ylabel="share right",
    )
    axes.legend(frameon=False, loc="lower right")


def _margins(axes: "Axes", report: Report) -> None:
    kinds = (
        ("by_difference", "the model's score difference", BLUE, "o-"),
        ("by_labeller_margin", "the labeller's margin", ORANGE, "s--"),
    )
    most = 0
    for name, label, colour, style in kinds:
        if groups := report[name]:
            _with_intervals(axes, [*range(1, len(groups) + 1)], groups, colour, style, label)
            most = max(most, len(groups))
    axes.axhline(0.5, color=GREY, lw=1, ls=":")
    axes.set(
        title="Accuracy by margin", xlabel="groups of pairs, smallest margin first", ylabel="share right"
    )
    axes.set_xticks(range(1, most + 1))
    axes.legend(frameon=False, title="grouped by", loc="lower right")


def _changes(axes: "Axes", report: Report) -> None:
    changes = {name: one["fell"] for name, one in report["must_matter"].items()}
    _bars(axes, changes)
    probes = report["must_not_matter"].items()
    failed = [name.replace("_", " ") for name, probe in probes if not probe["passed"]]
    note = (
        f"{', '.join(failed)} changes scores" if failed else "padding, batch size, trailing space: no change"
    )
    axes.set(title="Made worse: does the score fall?", xlabel=f"share of cases  ({note})")


def _lengths(axes: "Axes", report: Report) -> None:
    length = report["length"]
    tokens = [one["tokens"] for one in length["bins"]]
    means = [one["score"] for one in length["bins"]]
    spread = [one["deviation"] for one in length["bins"]]
    low, high = ([mean + sign * one for mean, one in zip(means, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(tokens, low, high, color=BLUE, alpha=0.15, lw=0, label="± standard deviation")
    axes.plot(tokens, means, "o-", color=BLUE, label="mean")
    known = length["spearman"]
    title = "Score by length" + ("" if known is None else f": rank correlation {known:+.2f}")
    axes.set(title=title, xlabel="tokens of the reply", ylabel="score")
    axes.legend(frameon=False)


def _agreement(axes: "Axes", report: Report) -> None:
    """With gold, by the one part in which pairs differ; where there is none, how often length wins."""
    if (gold := report["gold"]) is not None and gold["agreement"] is not None:
        groups = {"any": gold["agreement"]} | gold["where_only_this_differs"]
        _bars(axes, {name.replace("_", " "): one for name, one in groups.items()})
        axes.set(title="Agreement with gold", xlabel="share of the pairs that differ in this alone")
        return
    names = {"the label": "longer_is_chosen", "the model": "longer_scores_more"}
    length = report["length"]
    _bars(axes, {shown: length[name] for shown, name in names.items() if length[name] is not None})
    axes.set(title="Who prefers the longer reply?", xlabel="share of pairs of unequal length")


def _with_intervals(
    axes: "Axes", places: list[Any], groups: list[Report], colour: str, style: str, label: str
) -> None:
    values = [one["estimate"] for one in groups]
    reach = [
        [value - one["low"] for value, one in zip(values, groups, strict=True)],
        [one["high"] - value for value, one in zip(values, groups, strict=True)],
    ]
    axes.errorbar(places, values, reach, fmt=style, color=colour, ms=5, lw=1.5, capsize=3, label=label)


def _bars(axes: "Axes", groups: Mapping[str, Report]) -> None:
    """Shares with intervals, one row each, the first on top."""
    for row, one in enumerate(groups.values()):
        axes.plot([one["low"], one["high"]], [row, row], color=BLUE, lw=3, solid_capstyle="round")
        axes.plot(one["estimate"], row, "o", color=BLUE, ms=8)
        axes.annotate(
            f"{one['estimate']:.0%} of {one['pairs']:,}", (one["estimate"], row), (0, 8), ha="center",
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(xlim=(-0.08, 1.08), ylim=(len(groups) - 0.5, -0.7))
