"""`trueup lab`: look into the embedded lab, measure it, and write its data sets to files."""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trueup.recipes.errors import TrueupError
from trueup.recipes.lab import datasets, preferences, text

lab = typer.Typer(
    name="lab",
    help="The embedded lab: a small invented world whose text, tasks and preferences have a known truth.",
    no_args_is_help=True,
)

Split = Annotated[str, typer.Option(help="train, validation or test.")]
Seed = Annotated[int, typer.Option(help="Of the drawing; the world stays the same.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")]
Name = Annotated[str, typer.Argument(help=f"One of {', '.join(datasets.NAMES)}.")]
Rows = Annotated[int | None, typer.Option(help="How many rows (default: what the data set has).")]

TEMPERATURES = (0.05, 0.1, 0.15, 0.2, 0.3)
FLIPS = (0.0, 0.1, 0.2)


@lab.command()
def entropy(
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents to read.")] = 2000,
    split: Split = "validation",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The entropy floor of the lab's text in bits per byte: exact, and no model can beat it."""
    rows = datasets.rows("lab/text", split, documents=documents, seed=seed)
    floors = text.floors(row["text"] for row in rows)
    if as_json:
        print(json.dumps({k: asdict(f) | {"bits_per_byte": f.bits_per_byte} for k, f in floors.items()}))
        return
    table = Table("documents", "number", "bytes each", "bits each", "bits per byte", title="Entropy floor")
    for kind, floor in sorted(floors.items(), key=lambda item: -item[1].documents):
        each = (floor.bytes / floor.documents, floor.bits / floor.documents)
        table.add_row(
            kind, str(floor.documents), f"{each[0]:.0f}", f"{each[1]:.1f}", f"{floor.bits_per_byte:.4f}"
        )
    Console().print(table)


@lab.command()
def sample(name: Name, split: Split = "train", rows: Rows = 3, seed: Seed = 0) -> None:
    """Print the first rows of a data set."""
    for row in itertools.islice(datasets.rows(name, split, seed=seed), rows):
        Console().print_json(data=row)


@lab.command()
def ceiling(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to draw.")] = 2000,
    split: Split = "test",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The best accuracy against noisy labels, by the labeller's temperature and share of flips."""
    gaps, differing, ties = preferences.differences(split, pairs, seed)
    ceilings = [
        {
            "temperature": temperature,
            "flip": flip,
            "ceiling": preferences.label_ceiling(gaps, temperature, flip),
        }
        for temperature in TEMPERATURES
        for flip in FLIPS
    ]
    if as_json:
        print(json.dumps({"pairs": pairs, "ties": ties, "differs": differing, "ceilings": ceilings}))
        return
    table = Table("temperature", *(f"flip {flip:.0%}" for flip in FLIPS), title="Label ceiling")
    for temperature in TEMPERATURES:
        values = [row["ceiling"] for row in ceilings if row["temperature"] == temperature]
        table.add_row(str(temperature), *(f"{value:.3f}" for value in values))
    Console().print(table)
    shares = ", ".join(f"{part} {count / pairs:.0%}" for part, count in differing.most_common())
    Console().print(f"{pairs} pairs, {ties} ties dropped; they differ in: {shares}.")


@lab.command()
def write(
    name: Name,
    to: Annotated[Path, typer.Option(help="The .jsonl file to write; replaced as a whole or not at all.")],
    split: Split = "train",
    rows: Rows = None,
    seed: Seed = 0,
) -> None:
    """Write a data set to a JSON-lines file."""
    size = {} if rows is None else {"documents" if name == "lab/text" else "rows": rows}
    lines = (
        json.dumps(row, ensure_ascii=False) + "\n" for row in datasets.rows(name, split, seed=seed, **size)
    )
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(to)
    except OSError as error:
        raise TrueupError(f"{to}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        part.unlink(missing_ok=True)
    Console(stderr=True).print(f"{name} ({split}) is in {to}")
