"""`trueup doctor`: does a GPT, ours or your own, keep what the stages rely on; where not, what to change."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a class without a tokenizer is tried with: enough text for one of its own.
SAMPLE_TEXT = ["The cat sat on the mat, and then it slept for 12 hours. " * 20]
MODULES = "TRUEUP_IMPORT"


def import_own_modules() -> None:
    """Import what the environment variable TRUEUP_IMPORT names, so that its classes are registered.

    A stage opens directories by Transformers' Auto classes, which know a class of your own once its module
    has been imported; `TRUEUP_IMPORT=my_gpt trueup run FOLDER` does that in every process.

    Raises:
        UsageError: there is no such module.
    """
    for name in filter(None, os.environ.get(MODULES, "").split(",")):
        _import(name, f"{MODULES}: {name}")


def doctor(
    model: Annotated[str, typer.Option(help="module:Class of your GPT, or a model directory.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Its tokenizer's directory; default: the model's, or a small one made here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Check the contract that every stage relies on, and say what to change where it is broken.

    Padding, positions, cache, packing, tied weights, saving, gradient checkpointing, dropout, KL and DPO loss
    before the first step, end of text, chat template. Your class is built from its config_class's defaults.
    """
    from transformers.utils import logging

    from trueup.base.doctor import examine

    logging.set_verbosity_error()  # a fresh score head is no news here
    built, words = _from_class(model, tokenizer) if ":" in model else _from_directory(model, tokenizer)
    findings = []
    for finding in examine(built, words):
        findings.append(finding)
        if not as_json:
            Console(soft_wrap=True, highlight=False).print(
                f"[green]✓[/] {finding.name}" if finding.problem is None else f"[red]✗[/] {finding.name}",
                end="",
            )
            print(f": {finding.problem}" if finding.problem else "")
    broken = [finding for finding in findings if finding.problem]
    if as_json:
        print(json.dumps({"model": model, "ok": not broken, "checks": {f.name: f.problem for f in findings}}))
    if broken:
        raise TrueupError(f"{model}: {len(broken)} of {len(findings)} checks failed")


def _from_class(target: str, tokenizer: str | None) -> tuple[Any, "PreTrainedTokenizerBase"]:
    from transformers import PreTrainedModel

    from trueup.base.tokenizer import default_generation_config, train_tokenizer

    module, _, name = target.partition(":")
    found: Any = getattr(_import(module, f"--model {target}"), name, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or found.config_class is None:
        raise UsageError(
            f"--model {target}: is not a PreTrainedModel with a config_class; base/README.md shows the "
            "wrapper that makes an nn.Module one"
        )
    words = _open_tokenizer(tokenizer) if tokenizer else train_tokenizer(SAMPLE_TEXT, vocab_size=400)
    special = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    built = found(found.config_class(vocab_size=len(words), **special))
    if built.can_generate():
        built.generation_config = default_generation_config(words)
    return built, words


def _from_directory(path: str, tokenizer: str | None) -> tuple[Any, "PreTrainedTokenizerBase"]:
    from trueup.eval.loading import load_policy

    built, words = load_policy(Path(path), place="--model")
    return built, _open_tokenizer(tokenizer) if tokenizer else words


def _open_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer: {name}: {str(error).splitlines()[0]}") from error


def _import(name: str, place: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, and a console script does not: the current folder
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{place}: cannot be imported ({error}); run it from the module's folder") from error
