"""`trueup report`: from base model to aligned ones, in one table."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trueup.recipes.directory import is_comparison
from trueup.recipes.errors import UsageError


def report(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, e.g. runs/lab.", metavar="FOLDER")],
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an hour of this machine: adds costs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Show the stage ladder of a folder: what each step brought, and what it cost.

    It reads what the runs recorded and measures nothing; what is missing is a dash, with the command that
    measures it. Also writes FOLDER/report.html.
    """
    from trueup.eval.ladder import ladder, runs_below
    from trueup.eval.ladder_render import PAGE, print_ladder, write_page

    if is_comparison(folder):
        raise UsageError(f"{folder}: is a comparison, with a report of its own; name the folder of its runs")
    found = ladder(runs_below(folder), price)
    if not found.steps:
        raise UsageError(f"{folder}: holds no model of a stage yet, so there is no ladder to show")
    write_page(found, folder, folder / PAGE)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    print_ladder(found)
    print(folder / PAGE)
