"""`trueup exam`: a reward model, ours or foreign, on pairs it has not seen."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from trueup.recipes.directory import open_directory
from trueup.recipes.hub import results_folder
from trueup.recipes.reader import RecipeError, check_entries, parse_flags
from trueup.recipes.schema import schema_of


def exam(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A reward model's directory, or Hub id.", metavar="DIR")],
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="validation for choices, test for verdicts.")
    ] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Examine a reward model: accuracy, reliability, length, and what changes its scores.

    Further flags name the pairs, as a recipe does: --dataset_name lab/preferences, --test_split_size 0.2,
    --dataset_options '{rows: 500}'. Writes eval/exam.json and eval/exam.png into the directory; of a Hub id
    below runs/.
    """
    from trueup.base.data import DataArguments, data_fingerprint, load_data
    from trueup.eval.exam import examine, summary
    from trueup.eval.exam_plots import save_exam
    from trueup.eval.scorers import RewardModelScorer

    schema, problems = schema_of(DataArguments), list[str]()
    given = check_entries(parse_flags(context.args, schema), schema, problems, [])
    if problems:
        raise RecipeError(problems)
    data = DataArguments(**{name: entry.value for name, entry in given.items()})
    rows = load_data(data, split, "preference")
    opened = open_directory(directory, "reward")
    report = examine(RewardModelScorer.open(opened.path), rows)
    report |= {"data": data_fingerprint(data, split), "identity": opened.identity}
    saved = save_exam(report, results_folder(directory))
    print(json.dumps(report) if as_json else "\n".join([*summary(report), f"{saved} and .png"]))
