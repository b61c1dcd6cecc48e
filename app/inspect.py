"""`trueup inspect`: a model directory's figures and lineage, or what a recipe trains, token by token."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from trueup.recipes.directory import ModelDirectory, open_directory
from trueup.recipes.reader import read_recipe
from trueup.recipes.run import open_run


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A model directory, a Hub id, or an SFT recipe.", metavar="DIR|RECIPE")
    ],
    rows: Annotated[int, typer.Option(min=1, help="Of a recipe: how many rows to show.")] = 3,
    budget: Annotated[str | None, typer.Option(help="Of a recipe: one of its named budgets.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Of a directory: record and lineage as JSON.")
    ] = False,
) -> None:
    """Show where a model directory comes from, or the tokens a recipe trains.

    Of a directory: identity, figures, data, and its lineage as a tree. Of a recipe: real rows as tokens,
    coloured by whether they are trained.
    """
    if path.suffix in (".yaml", ".yml"):
        from trueup.app.tokens import show_tokens

        recipe = read_recipe(path, budget=budget)
        open_run(recipe)  # says in the recipe's own terms if a parent or the data is missing
        show_tokens(recipe, rows)
        return
    opened = open_directory(path)
    if as_json:
        print(json.dumps({"record": opened.record, "lineage": opened.lineage}, indent=2))
        return
    console = Console()
    console.print(_tree(opened))


def _tree(opened: ModelDirectory) -> Tree:
    record = opened.record
    tree = Tree(_label(opened.lineage))
    for title, lines in _facts(record).items():
        branch = tree.add(f"[bold]{title}[/bold]")
        for line in lines:
            branch.add(escape(line))
    if opened.lineage["parents"]:
        _add_parents(tree.add("[bold]from[/bold]"), opened.lineage["parents"])
    evaluations = sorted(opened.path.glob("eval/*.json"))
    if evaluations:
        branch = tree.add("[bold]evaluations[/bold]")
        for path in evaluations:
            branch.add(escape(path.name))
    return tree


def _facts(record: dict[str, Any]) -> dict[str, list[str]]:
    if not record:
        return {"record": ["none: not written by trueup; known by its content alone"]}
    facts = {
        "run": [
            f"{record['started']}, {record['seconds']:,.0f} s, {record['tokens']:,} tokens",
            ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        ],
        "figures": [f"{name} {value:.6g}" for name, value in record["metrics"].items()],
        "data": [
            f"{d.get('name')} [{d.get('split')}] {str(d.get('sha256', ''))[:12]}" for d in record["data"]
        ],
        "recipe": [f"{key}: {record['recipe'][key]}  ({place})" for key, place in record["origin"].items()],
    }
    return {title: lines for title, lines in facts.items() if lines}


def _add_parents(branch: Tree, parents: dict[str, dict[str, Any]]) -> None:
    for role, parent in parents.items():
        child = branch.add(f"{role}: {_label(parent)}")
        if parent["parents"]:
            _add_parents(child, parent["parents"])


def _label(lineage: dict[str, Any]) -> str:
    return f"[cyan]{escape(lineage['path'])}[/cyan] {lineage['stage']} [dim]{lineage['identity'][:12]}[/dim]"
