"""`trueup inspect RECIPE`: real rows as tokens, the trained ones marked, by the stage's own preparation."""

from typing import Any

from rich.console import Console
from rich.text import Text

from trueup.app.terminal import printable
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import Recipe

# Neighbouring tokens alternate between two shades, so that their borders can be seen.
TRAINED = ("bold green", "bold bright_green")
CONTEXT = ("dim", "dim bright_black")


def show_tokens(recipe: Recipe, rows: int, console: Console | None = None) -> None:
    """Print the first rows as they are trained, and what became of the whole data set.

    Args:
        rows: how many prepared rows; a packed row holds several documents.

    Raises:
        UsageError: the stage does not train on tokens that could be shown.
        TrueupError: what the stage itself finds wrong with model, data or template.
    """
    stage = recipe.build()
    if not hasattr(stage, "preview"):
        raise UsageError(f"{recipe.source}: stage {recipe.stage} has no tokens to show")
    preview = stage.preview(recipe.values, recipe.origin, rows)
    console = console or Console(highlight=False)
    coloured = console.color_system is not None
    meaning = "green is trained, grey is context" if coloured else "[what is trained stands in brackets]"
    for number, (ids, trained) in enumerate(preview.documents, start=1):
        console.print(f"\n{number}. {len(ids)} tokens, {sum(trained)} trained ({meaning})", markup=False)
        pieces = [_piece(preview.tokenizer, token) for token in ids]
        console.print(_coloured(pieces, trained) if coloured else Text(_bracketed(pieces, trained)))
    console.print()
    for note in preview.notes:
        console.print(note, markup=False)


def _piece(tokenizer: Any, token: int) -> str:
    """One token as text; part of a character as its bytes' names in the vocabulary."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token)
    return printable(text).replace("\n", "\u23ce\n")


def _coloured(pieces: list[str], trained: list[bool]) -> Text:
    text = Text()
    for number, (piece, learned) in enumerate(zip(pieces, trained, strict=True)):
        text.append(piece, style=(TRAINED if learned else CONTEXT)[number % 2])
    return text


def _bracketed(pieces: list[str], trained: list[bool]) -> str:
    parts, inside = [], False
    for piece, learned in zip(pieces, trained, strict=True):
        if learned != inside:
            parts.append("[" if learned else "]")
            inside = learned
        parts.append(piece)
    return "".join([*parts, "]" if inside else ""])
