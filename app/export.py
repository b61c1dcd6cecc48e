"""`trueup export`, `trueup import`: models in other people's forms, compared with the original."""

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trueup.recipes.directory import atomic_directory, atomic_file, identity, read_json, writing
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import local_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trueup.base.convert_parity import Parity
    from trueup.base.modeling_gpt import GPTForCausalLM

AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")]
OutType = Literal["f32", "f16", "q8_0"]


def export(
    directory: Annotated[
        Path, typer.Argument(help="A language model's directory, or Hub id.", metavar="DIR")
    ],
    output: Annotated[Path, typer.Option(help="Directory to write; with --to gguf the file.")],
    to: Annotated[Literal["llama", "qwen3", "gpt2", "gguf"], typer.Option(help="Whose form it takes.")],
    outtype: Annotated[OutType, typer.Option(help="With --to gguf: how matrices are stored.")] = "f16",
    as_json: AsJson = False,
) -> None:
    """Write a model in the form of Llama, Qwen3 or GPT-2, with tokenizer and chat template, or as GGUF.

    It then needs neither trueup nor remote code. What a form cannot express is refused, and what was written
    is read back and compared with the original.
    """
    from transformers.utils.logging import disable_progress_bar

    from trueup.eval.loading import load_policy

    disable_progress_bar()
    _check_free(output)
    model, tokenizer = load_policy(directory)
    if model.config.model_type != "trueup_gpt":
        raise UsageError(f"{directory}: is a {model.config.model_type}; only trueup's GPT is exported")
    if to == "gguf":
        found = _export_gguf(model, tokenizer, output, outtype)
    else:
        found = _export_directory(model, tokenizer, output, to)
    _report(found, {"to": to, "output": str(output)}, as_json)


def _export_gguf(
    model: "GPTForCausalLM", tokenizer: "PreTrainedTokenizerBase", output: Path, outtype: OutType
) -> "Parity":
    from trueup.base.convert_gguf import TOLERANCES, read_gguf, write_gguf
    from trueup.base.convert_parity import checked_parity

    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), atomic_file(output) as partial:
        write_gguf(model, tokenizer, partial, outtype)
        return checked_parity(model, read_gguf(partial, model.config), TOLERANCES[outtype])


def _export_directory(
    model: "GPTForCausalLM", tokenizer: "PreTrainedTokenizerBase", output: Path, form: str
) -> "Parity":
    from transformers import AutoModelForCausalLM

    from trueup.base.convert import export_model
    from trueup.base.convert_parity import checked_parity
    from trueup.base.trainer import save_model

    with atomic_directory(output) as staging:
        save_model(export_model(model, form), tokenizer, staging)
        return checked_parity(model, AutoModelForCausalLM.from_pretrained(staging))


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A Llama, Qwen3, GPT-2 (directory, Hub id), nanoGPT's or LLMs-from-scratch's state dict.",
            metavar="DIR|FILE",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Its tokenizer, where the source brings none: a directory or Hub id.")
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Of a state dict, which does not tell; default: a head for 64 channels."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model trained elsewhere a trueup GPT that every stage can go on from."""
    from transformers.utils.logging import disable_progress_bar

    from trueup.base.trainer import save_model

    disable_progress_bar()
    _check_free(output)
    source = Path(local_directory(source))
    if source.is_dir():
        model, found = _import_directory(source)
    else:
        model, found = _import_file(source, num_attention_heads)
    words = _tokenizer(tokenizer or (str(source) if source.is_dir() else None), model.config.vocab_size)
    with atomic_directory(output) as staging:
        save_model(model, words, staging)
    parameters = sum(weight.numel() for weight in model.parameters())
    about = {"from": str(source), "output": str(output), "identity": identity(output)[:12]}
    _report(found, about | {"parameters": f"{parameters:,}"}, as_json)


def _import_directory(source: Path) -> tuple["GPTForCausalLM", "Parity"]:
    from transformers import AutoModelForCausalLM

    from trueup.base.convert import FORMS, import_model
    from trueup.base.convert_parity import checked_parity

    if not (source / "config.json").exists():
        raise UsageError(f"{source}: not a model directory: config.json is missing")
    name = read_json(source / "config.json").get("model_type")
    if name not in FORMS:
        raise UsageError(f"{source}: a {name} cannot be imported; {', '.join(FORMS)} can")
    theirs, report = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise TrueupError(f"{source}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    model = import_model(theirs)
    return model, checked_parity(model, theirs)


def _import_file(source: Path, num_attention_heads: int | None) -> tuple["GPTForCausalLM", "Parity"]:
    """A bare state dict has no model to compare with; Transformers' GPT-2 with the same weights is one."""
    from trueup.base.convert import export_model, import_state_dict
    from trueup.base.convert_parity import checked_parity

    content = _read_weights(source)
    arguments: dict[str, Any] = {}
    if isinstance(content.get("model"), dict):  # nanoGPT's ckpt.pt: {"model": ..., "model_args": ..., ...}
        content, arguments = content["model"], content.get("model_args", {})
    model = import_state_dict(content, num_attention_heads or arguments.get("n_head"))
    return model, checked_parity(model, export_model(model, "gpt2"))


def _read_weights(source: Path) -> dict[str, Any]:
    """A dictionary of tensors, and nothing that a pickle could run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not source.is_file():
        raise UsageError(f"{source}: no such file or directory")
    try:
        if source.suffix == ".safetensors":
            return dict(load_file(source))
        content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UsageError(
            f"{source}: not a state dict ({str(error).splitlines()[0]}); save it with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{source}: holds a {type(content).__name__}; save model.state_dict()")
    return content


def _tokenizer(name: str | None, vocab_size: int) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if name is None:
        raise UsageError("--tokenizer: the source brings none; name the one it was trained with")
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_directory(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer: {name}: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"--tokenizer: {name} has {len(tokenizer):,} tokens and the model {vocab_size:,} embeddings; "
            "name the one it was trained with"
        )
    return tokenizer


def _check_free(output: Path) -> None:
    if output.exists():
        raise UsageError(f"--output {output}: exists; choose another place, or move it away")


def _report(found: "Parity", about: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(about | {"parity": found.as_dict()}))
    else:
        print("  ".join(f"{name} {value}" for name, value in about.items()))
        print(f"parity  {found.line()}")
