"""`trueup VERB --help`: every key of a stage with type, default and meaning, read off its schema."""

import itertools

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trueup.recipes.reader import COMMON_KEYS, scalar
from trueup.recipes.schema import Key, schema_of, type_name
from trueup.recipes.stages import STAGES, stage_class

# Whose keys they are, for headings: the classes a stage's schema is put together from.
_HEADINGS = {
    "DataArguments": "Data",
    "EvalTasksArguments": "Benchmarks along the way",
    "ModelConfig": "Model and LoRA (TRL's ModelConfig)",
    "TrainingArguments": "Training (Transformers' TrainingArguments)",
}


def print_stage_help(verb: str) -> None:
    """Print usage and every key of the stage, its own keys first."""
    console = Console()
    schema = schema_of(stage_class(verb))
    console.print(f"\n[bold]trueup {verb}[/bold]: {STAGES[verb][1]}\n")
    console.print(
        f"  trueup {verb} --config RECIPE.yaml [--KEY VALUE ...] [--budget NAME] [--dry-run] [--debug]\n"
    )
    console.print(
        "Keys stand in the recipe as `key: value`, or on the command line as --key value, which wins."
    )
    common = [Key(name, str, None, text) for name, text in COMMON_KEYS.items()]
    needed = [key for key in schema.values() if key.required]
    console.print(_table("Every recipe", [*needed, *common]))
    rest = [key for key in schema.values() if not key.required]
    for group, keys in itertools.groupby(rest, key=lambda key: key.group):
        console.print(_table(_HEADINGS.get(group, f"{verb} ({group})"), list(keys)))


def _table(title: str, keys: list[Key]) -> Table:
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("key", no_wrap=True, style="cyan")
    table.add_column("default", max_width=18, overflow="fold")
    table.add_column("meaning", overflow="fold")
    for key in keys:
        default = "required" if key.required else "" if key.default is None else scalar(key.default)
        meaning = Text(key.help or "(no description)")
        meaning.append(f" [{type_name(key)}]", style="dim")
        table.add_row(key.name, default, meaning)
    return table
