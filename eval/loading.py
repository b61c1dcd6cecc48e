"""Model directories as models: with the tokenizer beside them, checked, in evaluation mode."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trueup.recipes.directory import ModelDirectory, open_directory
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Of a Hub repository what a model directory is made of: no other format of the same weights.
_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def local_directory(name: str, place: str = "") -> str:
    """A model directory as it is, or the snapshot of a Hub id (`org/name`, `org/name@revision`).

    A snapshot lies in the Hub's own cache under the hash of its commit; with HF_HUB_OFFLINE=1, or without a
    network, it must be there already.

    Args:
        place: where the name was written, for messages.

    Raises:
        UsageError: there is neither such a directory nor such a repository.
    """
    hub = _HUB_ID.fullmatch(name)
    if Path(name).is_dir() or hub is None or Path(name).parent.is_dir():
        return name  # what is missing in a folder that exists is a directory, and whoever opens it says so
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(hub["id"], revision=hub["revision"], allow_patterns=_FILES)
    except (HfHubHTTPError, OSError, ValueError) as error:  # refused; not reached; not cached, offline
        at, reason = f"{place}: " if place else "", str(error).strip().splitlines()[0]
        raise UsageError(
            f"{at}{name}: no such model directory (run the stage that writes it first), nor can it be had "
            f"from the Hub: {reason}"
        ) from error


def load_policy(
    directory: Path | str, dtype: "torch.dtype | None" = None, place: str = ""
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal language model and its tokenizer, on the CPU.

    Args:
        dtype: of the weights; default: as stored.
        place: where the path was written, for messages.

    Raises:
        UsageError: no such directory, or it holds another kind of model.
        TrueupError: it is damaged, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, open_directory(directory, "causal-lm", place), dtype)


def load_reward_model(
    directory: Path | str, dtype: "torch.dtype | None" = None, place: str = ""
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", ModelDirectory]:
    """A trained reward model, its tokenizer, and its checked directory.

    Raises:
        UsageError: no such directory, or it holds another kind of model.
        TrueupError: it is damaged, its head was never trained, or it gives more than one score.
    """
    from transformers import AutoModelForSequenceClassification

    opened = open_directory(directory, "reward", place)
    model, tokenizer = _load(AutoModelForSequenceClassification, opened, dtype)
    if model.config.model_type == "trueup_gpt" and not opened.record:
        raise TrueupError(
            f"{directory}: no trueup.json says that this reward model was trained: its head may be random; "
            "name the output_dir of a reward stage"
        )
    if model.config.num_labels != 1:
        raise TrueupError(
            f"{directory}: gives {model.config.num_labels} scores per text, and a reward model gives one"
        )
    return model, tokenizer, opened


def _load(
    auto_class: type, opened: ModelDirectory, dtype: "torch.dtype | None"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoTokenizer

    import trueup.base  # noqa: F401  # registers our architecture: no remote code is ever run

    try:
        model, report = auto_class.from_pretrained(  # type: ignore[attr-defined]
            opened.path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"{opened.path}: this model needs Python code of its own, which is never run to measure one; "
            "choose a model whose architecture transformers has"
        ) from error
    fresh = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if fresh:
        raise TrueupError(
            f"{opened.path}: its weights lack {', '.join(fresh[:3])}, which would be newly initialised; "
            "name the directory of a finished, trained model"
        )
    return model.eval(), AutoTokenizer.from_pretrained(opened.path)
