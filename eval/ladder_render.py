"""The stage ladder for people: on the terminal, and as a page of its own."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trueup.eval import ladder_plots as plots
from trueup.eval.ladder import BITS, KL, LENGTH, REPETITION, SOURCES, WIN, Ladder, Step
from trueup.eval.ladder_runs import BASELINE, LOG, RunGroup
from trueup.eval.pages import render, themed
from trueup.recipes.directory import RECORD, atomic_file, writing

PAGE = "report.html"
TEMPLATE = "ladder.html.jinja"
RUNS = ("run", BITS, "above floor", "what differs", "parameters", "time")
RUNS_SHOWN = 4  # of them, where there is little room
MISSING, EVEN = "–", "≈"
TRANSFER = (
    "Held-out bits per byte at the end, by learning rate: one line a width, ringed where it is lowest. "
    "Where a rate transfers, the rings stand above each other."
)
CURVES = "Training loss of each logged step, and held-out bits per byte."
START = f"The first {plots.FIRST} steps: training loss, and the norm of the gradient before it is clipped."
_RAISED = {"c": "ᶜ", "t": "ᵗ", "v": "ᵛ", "": ""}
_DIGITS = {BITS: 4, WIN: 1, KL: 2, LENGTH: 1, REPETITION: 2}  # of lm-eval's figures 3


def shown(step: Step, figure: str) -> str:
    """59.5 ±0.9, ≈ where it is within noise, a raised letter where it was measured otherwise."""
    if (cell := step.cells.get(figure)) is None:
        return MISSING if step.may_have(figure) else ""
    digits = _DIGITS.get(figure, 3)
    reach = "" if cell.reach is None else f" ±{cell.reach:.{digits}f}"
    bound, even = "≤ " * cell.bound, f" {EVEN}" * cell.even
    return f"{bound}{cell.value:.{digits}f}{reach}{_RAISED[cell.source]}{even}"


def duration(seconds: float) -> str:
    """6 min 43 s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def rows(ladder: Ladder) -> list[tuple[str, list[str]]]:
    """(figure, one text per step)."""
    found = [(figure, [shown(step, figure) for step in ladder.steps]) for figure in ladder.figures]
    found.append(("time", [_if_run(step, duration(step.seconds)) for step in ladder.steps]))
    found.append(("tokens trained", [_if_run(step, f"{step.tokens:,}") for step in ladder.steps]))
    costs = [ladder.cost(step.seconds) for step in ladder.steps]
    told = [MISSING if cost is None else f"{cost:,.2f}" for cost in costs]
    found.append(("cost", [_if_run(step, cost) for step, cost in zip(ladder.steps, told, strict=True)]))
    return found


def _if_run(step: Step, text: str) -> str:
    return text if step.identities else ""  # best-of-n is no run


def run_rows(group: RunGroup) -> list[list[str]]:
    """One line a run, under RUNS."""
    return [
        [
            run.name,
            f"{run.bits_per_byte:.4f}",
            MISSING if run.above_floor is None else f"{run.above_floor:.4f}",
            BASELINE if run.name == group.baseline else run.difference or "nothing",
            f"{run.parameters:,}",
            duration(run.seconds),
        ]
        for run in group.runs
    ]


def account(ladder: Ladder) -> str:
    """What was run besides, and what it took all together."""
    beside = [f"{name} {duration(seconds)}" for name, (seconds, _) in ladder.besides.items()]
    total = f"all together {duration(ladder.seconds)}, {ladder.tokens:,} tokens trained"
    if ladder.price is not None:
        total += f", {ladder.cost(ladder.seconds):,.2f} at {ladder.price:g} per hour"
    return (f"Besides: {', '.join(beside)}; " if beside else "") + total + "."


def legend(ladder: Ladder) -> list[str]:
    """What the marks in use mean; and how to get what is missing."""
    cells = [cell for step in ladder.steps for cell in step.cells.values()]
    lines = ["± half of a 95 % interval."] if any(cell.reach is not None for cell in cells) else []
    if any(cell.even for cell in cells):
        lines.append(f"{EVEN} within noise of the model it began as; of a win rate, of 50 %; of a KL, of 0.")
    lines += [
        f"{_RAISED[mark]} {SOURCES[mark]}." for mark in "ctv" if any(cell.source == mark for cell in cells)
    ]
    ways: dict[str, list[str]] = {}
    for figure, way in ladder.missing().items():
        ways.setdefault(way, []).append(figure)
    return lines + [f"{MISSING} {'; '.join(figures)}: {way}" for way, figures in ways.items()]


def print_ladder(ladder: Ladder, console: Console | None = None) -> None:
    """The ladder as a table, with its legend; and pretraining runs held against each other."""
    console = console or Console()
    if ladder.climbs:
        _print_steps(ladder, console)
    for group in ladder.groups:
        console.print(f"\nPretraining runs in {group.folder}", highlight=False, markup=False)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for head in RUNS[:RUNS_SHOWN]:
            table.add_column(head, no_wrap=head != RUNS[3], overflow="fold")
        for texts in run_rows(group):
            table.add_row(*map(escape, texts[:RUNS_SHOWN]))
        console.print(table)
    for line in [account(ladder), *(legend(ladder) if ladder.climbs else [])]:
        console.print(line, style="dim", highlight=False, markup=False)
    for note in ladder.notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def _print_steps(ladder: Ladder, console: Console) -> None:
    stages = ("stage", [step.stage for step in ladder.steps])
    lines = [("", [escape(step.name) for step in ladder.steps]), stages, *rows(ladder)]
    if len(ladder.steps) > len(lines):  # rather long than wide
        lines = [
            (first, list(rest))
            for first, *rest in zip(*([name, *texts] for name, texts in lines), strict=True)
        ]
    table = Table(lines[0][0], *lines[0][1], box=None, padding=(0, 2, 0, 0))
    for name, texts in lines[1:]:
        table.add_row(name, *texts)
    console.print(table)


def write_page(ladder: Ladder, folder: Path, path: Path) -> None:
    """The ladder as one self-contained page.

    Args:
        folder: whose runs these are, for the heading.
    """
    page = render(
        TEMPLATE,
        folder=folder,
        ladder=ladder,
        rows=rows(ladder),
        account=account(ladder),
        legend=legend(ladder),
        duration=duration,
        heads=RUNS,
        groups=[(group, run_rows(group), draw(group)) for group in ladder.groups],
    )
    with writing(path), atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def draw(group: RunGroup) -> list[tuple[dict[str, str], str, str]]:
    """(plot by theme, what it shows, file of the runs that it is drawn from), as far as a group goes."""
    found = []
    if group.tries_rates:
        found.append((themed(plots.transfer, (group,)), TRANSFER, RECORD))
    if len(group.runs) <= plots.MOST_CURVES:
        content = (group, plots.read_logs(group))
        found += [(themed(plots.curves, content), CURVES, LOG), (themed(plots.start, content), START, LOG)]
    return found
