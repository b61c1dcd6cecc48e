"""Running recipes: one stage in this process, or a folder of them in the order they need each other."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.table import Table

from trueup.app.push import StagePush
from trueup.recipes.directory import RECORD, read_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import Recipe, RecipeError, parse_flags, read_recipe, render
from trueup.recipes.run import Run, is_main_process, open_run
from trueup.recipes.schema import schema_of
from trueup.recipes.stages import stage_class

# ---------------------------------------------------------------- one stage


def run_stage(recipe: Recipe) -> Run:
    """Run one recipe in this process, or say that its result is already there."""
    for note in recipe.notes:
        _say(note)
    for key, origin in recipe.origin.items():
        if origin.startswith("this machine"):
            _say(f"{key}: {json.dumps(recipe.values[key])} ({origin})")
    run, stage = open_run(recipe)
    publishing = StagePush.of(recipe)
    if run.done():
        _say(f"{run.output_dir}: complete and unchanged, nothing to do")
    else:
        if publishing:
            publishing.check()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one for every file read or written, across ours
        run.measure = _measure(recipe)
        with run.working():
            stage.run(run)
        _say(f"{run.output_dir}: done")
    if publishing and publishing.due(run):
        publishing.push(run)
    return run


def _measure(recipe: Recipe) -> Callable[[Any, Any], dict[str, float]] | None:
    """What `eval_tasks` asks evaluations to measure: stages know no benchmarks."""
    if not recipe.values.get("eval_tasks"):
        return None
    from trueup.eval.harness import TaskMeasure

    place = f"{recipe.origin['eval_tasks']}: eval_tasks"
    return TaskMeasure(recipe.values["eval_tasks"], recipe.values["eval_tasks_limit"], place)


def _say(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


# ---------------------------------------------------------------- a folder


@dataclass
class Outcome:
    """What became of one recipe of a folder."""

    recipe: Recipe
    status: str  # complete | done | failed
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        output = Path(str(self.recipe.values["output_dir"]))
        record = read_json(output / RECORD) if (output / RECORD).exists() else {}
        return {
            "stage": self.recipe.stage,
            "recipe": str(self.recipe.source),
            "status": self.status,
            "seconds": round(self.seconds or record.get("seconds", 0.0), 1),  # what it took when it ran
            "output_dir": str(output),
            "identity": record.get("identity", ""),
            "tokens": record.get("tokens", 0),
            "metrics": record.get("metrics", {}),
        }


def run_one(
    path: Path, flags: list[str], budget: str | None, dry_run: bool, launcher: str | None, as_json: bool
) -> None:
    """`trueup run RECIPE`: as a folder of one, with flags."""
    stage = read_recipe(path, budget=budget).stage if flags else None
    entries = parse_flags(flags, schema_of(stage_class(stage))) if stage else []
    recipe = read_recipe(path, flags=entries, budget=budget)
    if dry_run:
        print(render(recipe))
        return
    run_recipes([recipe], flags, budget, launcher, as_json)


def run_folder(folder: Path, budget: str | None, dry_run: bool, launcher: str | None, as_json: bool) -> None:
    """`trueup run FOLDER`: every recipe in the folder, parents first; stops at the first failure.

    Raises:
        UsageError: a recipe is wrong, or the recipes cannot be ordered.
        TrueupError: a stage failed; names it and its log.
    """
    recipes = order(read_folder(folder, budget))
    if dry_run:
        _print_plan(recipes)
        return
    run_recipes(recipes, [], budget, launcher, as_json)
    if not as_json:
        _print_ladder([Path(str(recipe.values["output_dir"])) for recipe in recipes])


def read_folder(folder: Path, budget: str | None) -> list[Recipe]:
    """Every recipe of a folder, read and checked; the mistakes of all files are reported together."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise UsageError(f"{folder}: holds no recipes (*.yaml)")
    recipes, problems = [], []
    for path in files:
        try:
            recipes.append(read_recipe(path, budget=budget))
        except RecipeError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(problems)
    return recipes


def order(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes so that each comes after those whose `output_dir` it reads.

    Raises:
        UsageError: two write the same directory, or they wait for one another in a circle.
    """
    writers: dict[Path, Recipe] = {}
    for recipe in recipes:
        output = _normal(recipe.values["output_dir"])
        if output in writers:
            raise UsageError(
                f"{recipe.source} and {writers[output].source} both write {recipe.values['output_dir']}"
            )
        writers[output] = recipe
    sorter: TopologicalSorter[Path] = TopologicalSorter()
    for output, recipe in writers.items():
        mentioned = {
            _normal(text)
            for key, value in recipe.values.items()
            for text in _texts(value)
            if key != "output_dir"
        }
        needs = [w for w in writers if w != output and any(w == m or w in m.parents for m in mentioned)]
        sorter.add(output, *needs)
    try:
        return [writers[output] for output in sorter.static_order()]
    except CycleError as error:
        circle = " -> ".join(str(writers[path].source) for path in error.args[1])
        raise UsageError(f"these recipes wait for one another: {circle}") from error


def _normal(path: Any) -> Path:
    return Path(os.path.abspath(str(path)))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, lists and mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def run_recipes(
    recipes: list[Recipe],
    flags: Sequence[str] = (),
    budget: str | None = None,
    launcher: str | None = None,
    as_json: bool = False,
) -> None:
    """Run recipes in their order, each in a process of its own; print what became of them.

    Raises:
        UsageError, TrueupError: the first that failed; names it and its log.
    """
    outcomes: list[Outcome] = []
    shown = sys.stderr if as_json else sys.stdout  # with --json, stdout holds the JSON alone
    try:
        for number, recipe in enumerate(recipes, 1):
            run, _ = open_run(recipe)
            title = f"[{number}/{len(recipes)}] {recipe.stage}: {recipe.source} -> {run.output_dir}"
            publishing = StagePush.of(recipe)
            if run.done() and not (publishing and publishing.due(run)):
                print(f"{title}: complete and unchanged, skipped", file=shown, flush=True)
                outcomes.append(Outcome(recipe, "complete"))
                continue
            print(title, file=shown, flush=True)
            started = time.monotonic()
            code = _start(recipe, run, flags, budget, launcher, shown.buffer)
            outcomes.append(Outcome(recipe, "failed" if code else "done", time.monotonic() - started))
            if code:
                failure = UsageError if code == UsageError.exit_code else TrueupError
                raise failure(
                    f"stage {recipe.stage} ({recipe.source}) failed; its log: {run.work_dir / 'log.txt'}"
                )
    finally:
        _print_summary(outcomes, as_json)


def _start(
    recipe: Recipe, run: Run, flags: Sequence[str], budget: str | None, launcher: str | None, shown: BinaryIO
) -> int:
    """Run a stage in a process of its own, its output shown and kept in the log; returns its exit code.

    A process of its own gives memory back whole, survives here if it is killed, and can be a launcher's.
    """
    command = shlex.split(launcher) if launcher else [sys.executable]
    command += ["-m", "trueup.app", recipe.stage, "--config", str(recipe.source), *flags]
    command += ["--budget", budget] if budget else []
    run.work_dir.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (run.work_dir / "log.txt").open("ab") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        with _signals_to(child):
            assert child.stdout is not None
            while chunk := os.read(child.stdout.fileno(), 1 << 16):
                shown.write(chunk)
                shown.flush()
                log.write(chunk)
                log.flush()
            return child.wait()


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the child runs it decides what a signal means: it saves a checkpoint and ends.

    Ctrl-C reaches it from the terminal by itself; SIGTERM is passed on.
    """
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


# ---------------------------------------------------------------- printing

_COUNTERS = ("step", "steps", "epochs")


def _print_plan(recipes: list[Recipe]) -> None:
    table = Table("#", "stage", "recipe", "writes", box=None)
    for number, recipe in enumerate(recipes, 1):
        table.add_row(str(number), recipe.stage, str(recipe.source), str(recipe.values["output_dir"]))
    Console().print(table)


def _print_summary(outcomes: list[Outcome], as_json: bool) -> None:
    rows = [outcome.as_dict() for outcome in outcomes]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("stage", "result", "time", "tokens", "identity", "directory", box=None)
    for row in rows:
        seconds, tokens = f"{row['seconds']:,.0f} s", f"{row['tokens']:,}"
        table.add_row(row["stage"], row["status"], seconds, tokens, row["identity"][:12], row["output_dir"])
    console = Console()
    if rows:
        console.print()
        console.print(table)
        console.print()
    for row in rows:
        shown = {name: value for name, value in row["metrics"].items() if name not in _COUNTERS}
        figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        console.print(f"{row['stage']}: {figures}", highlight=False)


def _print_ladder(directories: list[Path]) -> None:
    """What the folder's runs come to, step by step; `trueup report` shows the same later."""
    from trueup.eval.ladder import ladder
    from trueup.eval.ladder_render import print_ladder

    found = ladder(directories)
    if len(found.steps) > 1:
        print()
        print_ladder(found)
