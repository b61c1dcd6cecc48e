"""`trueup card`: README.md of a model or a data set, with the Hub's metadata, made from the records."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from trueup.recipes.directory import check_writable, holds_model, is_comparison, writing
from trueup.recipes.errors import UsageError

README = "README.md"


@dataclass(frozen=True)
class Card:
    """A card that can be published.

    Args:
        text: README.md, its metadata first.
        files: repository path -> what lies there: the pictures on the page.
    """

    text: str
    files: dict[str, Path | bytes] = field(default_factory=dict)


def card(
    directory: Path | str,
    repo_id: str | None = None,
    license: str | None = None,  # the Hub's word
    comparison: Path | None = None,
) -> Card:
    """The card of a model directory, an adapter, a data set's directory, or a file of rows.

    Args:
        repo_id: where it will be, `user/name`; default: the page names the directory.
        license: the Hub's identifier of a licence; without one the card has none, and says so.
        comparison: the folder of one that the model took part in; default: the newest beside it.

    Raises:
        UsageError: there is nothing of that kind; or the comparison is none, or not of this model.
        TrueupError: it is damaged, or was changed after it was written.
    """
    path = Path(directory)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UsageError(
            f"--license {license}: not an identifier of the Hub's, such as apache-2.0 or cc-by-4.0"
        )
    if not path.exists():
        raise UsageError(f"{path}: no such model directory or data set")
    if path.is_dir() and is_comparison(path):
        raise UsageError(f"{path}: a comparison; name a model, and this with --comparison")
    from huggingface_hub import DatasetCard, ModelCard

    if path.is_file() or not holds_model(path):
        from trueup.app.card_data import data_card

        if comparison is not None:
            raise UsageError(f"--comparison: is for models, and {path} is a data set")
        head, page, files = data_card(path, repo_id, license)
        return Card(str(DatasetCard(f"---\n{head.to_yaml()}\n---\n\n{page}")), files)
    from trueup.app.card_metadata import metadata
    from trueup.app.card_model import model_card, open_subject

    subject = open_subject(path, repo_id, license, comparison)
    page, files = model_card(subject)
    return Card(str(ModelCard(f"---\n{metadata(subject).to_yaml()}\n---\n\n{page}")), files)


def save(made: Card, folder: Path) -> None:
    """Write README.md and its pictures into a folder; a model directory stays the model it was."""
    check_writable(folder)
    for name, content in {README: made.text.encode(), **made.files}.items():
        path = folder / name
        if isinstance(content, Path):
            if path.exists() and path.samefile(content):
                continue
            content = content.read_bytes()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def card_command(
    directory: Annotated[
        Path,
        typer.Argument(help="A model directory, an adapter, or a data set.", metavar="DIR|FILE"),
    ],
    to: Annotated[str | None, typer.Option(help="Where it will be published: user/name.")] = None,
    license: Annotated[
        str | None, typer.Option(help="The Hub's identifier, e.g. apache-2.0; default: none, and it says so.")
    ] = None,
    comparison: Annotated[
        Path | None, typer.Option(help="A comparison it took part in; default: the newest beside it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for README.md and its pictures; default: print it.")
    ] = None,
) -> None:
    """Show the card of a model or a data set: what it is, what was measured, where it comes from, its limits.

    Everything on it stands in trueup.json, eval/*.json, or the comparison; what nobody measured is said to be
    missing. `trueup push` publishes it.
    """
    made = card(directory, to, license, comparison)
    if output is None:
        print(made.text)
        return
    save(made, output)
    print(f"{output / README}" + "".join(f"\n{output / name}" for name in made.files))
