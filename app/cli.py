"""The `trueup` command: verbs, help, and the one place where errors become messages and exit codes."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from trueup.app.bench import bench
from trueup.app.card import card_command
from trueup.app.chat import chat
from trueup.app.doctor import doctor, import_own_modules
from trueup.app.evaluate import evaluate
from trueup.app.exam import exam
from trueup.app.export import export, import_
from trueup.app.inspect import inspect
from trueup.app.lab import lab
from trueup.app.lab_measure import learned, score
from trueup.app.merge import merge
from trueup.app.push import push
from trueup.app.report import report
from trueup.app.runner import run_folder, run_one, run_stage
from trueup.app.serve import serve
from trueup.app.ui import app as app_command
from trueup.recipes.directory import disk_error
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import parse_flags, read_recipe, render
from trueup.recipes.schema import schema_of
from trueup.recipes.stages import STAGES, stage_class

app = typer.Typer(
    name="trueup",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Take a GPT you built yourself from raw text to an aligned chat model.\n\n"
        "Every stage is one YAML recipe: [bold]trueup run recipes/lab[/bold] runs a folder of them in order, "
        "[bold]trueup pretrain --config FILE[/bold] one by hand, and a flag such as --learning_rate 1e-4 "
        "wins over the file. [bold]trueup VERB --help[/bold] lists every key of a stage."
    ),
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage (command line or recipe). --debug shows tracebacks.",
)

RUN, STAGE, LOOK = "Run recipes", "Stages, one by one", "Models and data"


@app.command(
    "run",
    rich_help_panel=RUN,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def run_command(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(help="A recipe, or a folder of recipes.", metavar="RECIPE|FOLDER")
    ],
    budget: Annotated[str | None, typer.Option(help="One of the recipes' named budgets, e.g. smoke.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
    launcher: Annotated[
        str | None, typer.Option(help='How to start each stage, e.g. "torchrun --nproc_per_node 2".')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run a recipe, or a folder of recipes in the order they need each other.

    What is complete and unchanged is skipped, what was interrupted is resumed. Further flags (--key value)
    override keys of a single recipe.
    """
    if recipe.is_dir():
        if context.args:
            raise UsageError(f"'{context.args[0]}': keys can be overridden for one recipe, not for a folder")
        run_folder(recipe, budget=budget, dry_run=dry_run, launcher=launcher, as_json=as_json)
    else:
        run_one(recipe, context.args, budget=budget, dry_run=dry_run, launcher=launcher, as_json=as_json)


def _stage_command(verb: str, summary: str) -> Callable[..., None]:
    @app.command(
        verb,
        rich_help_panel=STAGE,
        help=summary,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )
    def command(
        context: typer.Context,
        config: Annotated[Path | None, typer.Option(help="The recipe (YAML).")] = None,
        budget: Annotated[str | None, typer.Option(help="One of the recipe's named budgets.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe only.")] = False,
        help_wanted: Annotated[bool, typer.Option("--help", "-h", help="Every key of the stage.")] = False,
    ) -> None:
        if help_wanted:
            from trueup.app.help import print_stage_help

            return print_stage_help(verb)
        if config is None and not context.args:
            raise UsageError(f"name a recipe: trueup {verb} --config FILE (or all keys as flags; see --help)")
        flags = parse_flags(context.args, schema_of(stage_class(verb)))
        recipe = read_recipe(config, stage=verb, flags=flags, budget=budget)
        if dry_run:
            return print(render(recipe))
        run_stage(recipe)
        return None

    return command


for _verb, (_target, _summary) in STAGES.items():
    _stage_command(_verb, _summary)


class PlainHelp(TyperCommand):
    """A command whose options are listed plainly: in a table of five columns a terminal cuts their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "rich_markup_mode": None})


_LOOKING: dict[str, Callable[..., None]] = {
    "chat": chat, "eval": evaluate, "app": app_command, "serve": serve, "inspect": inspect, "merge": merge,
    "doctor": doctor, "report": report, "card": card_command, "export": export, "import": import_,
    "push": push,
}  # fmt: skip
for _verb, _command in _LOOKING.items():
    app.command(_verb, cls=PlainHelp, rich_help_panel=LOOK)(_command)
app.command(
    "exam",
    cls=PlainHelp,
    rich_help_panel=LOOK,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(exam)
lab.command()(score)
lab.command()(learned)
app.add_typer(bench, name="bench", rich_help_panel=LOOK)
app.add_typer(lab, name="lab", rich_help_panel=LOOK)


# ---------------------------------------------------------------- errors


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `trueup` script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("TRUEUP_DEBUG") == "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with contextlib.suppress(ValueError):  # it may stand anywhere on the line
        words.remove("--debug")
    try:
        import_own_modules()
        app(args=words, prog_name="trueup")
    except KeyboardInterrupt:
        print("\ntrueup: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `trueup ... | head` closed the pipe; that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        message, code = explain(error)
        print(f"trueup: {message}", file=sys.stderr)
        sys.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """(message, exit code) for an exception that reached the top."""
    if isinstance(error, TrueupError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install {error.name}", 1
    if "pip install" in str(error):  # a library that names what the recipe asks of it, and the remedy
        return str(error), 1
    if isinstance(error, OSError) and error.errno is not None:
        return str(disk_error(Path(str(error.filename or ".")), error)), 1
    if _out_of_memory(error):
        advice = (
            "lower per_device_train_batch_size (raise gradient_accumulation_steps to match), or max_length"
        )
        return f"out of memory: {str(error).splitlines()[0]}; {advice}", 1
    return f"internal error, please report it: {type(error).__name__}: {error}\n(--debug shows where)", 1


def _out_of_memory(error: Any) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
