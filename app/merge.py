"""`trueup merge`: an adapter and its base become a model directory."""

from pathlib import Path
from typing import Annotated

import typer

from trueup.recipes.directory import atomic_directory, identity
from trueup.recipes.errors import UsageError


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory, or Hub id.", metavar="ADAPTER")],
    to: Annotated[Path, typer.Option(help="Model directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was trained on; default: the one it names.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base model brings.")
    ] = False,
) -> None:
    """Merge a LoRA adapter, trained anywhere, into its base model.

    Adapters trained by trueup need this not: their model directory is merged already.
    """
    from transformers.utils.logging import disable_progress_bar

    from trueup.base.adapters import merge_directory
    from trueup.base.trainer import save_model

    disable_progress_bar()
    if to.exists():
        raise UsageError(f"--to {to}: exists; choose another place, or move it away")
    model, tokenizer, name = merge_directory(adapter, base, trust_remote_code)
    with atomic_directory(to) as staging:
        save_model(model, tokenizer, staging)
    print(f"{to}: {name} with {adapter} merged in, {identity(to)[:12]}")
