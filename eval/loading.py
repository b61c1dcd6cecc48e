"""Model directories as models: with the tokenizer beside them, checked, in evaluation mode."""

from pathlib import Path
from typing import TYPE_CHECKING

from trueup.recipes.directory import ModelDirectory, open_directory
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_policy(
    directory: Path | str, dtype: "torch.dtype | None" = None, place: str = ""
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal language model and its tokenizer, on the CPU.

    Args:
        directory: a model directory, or a Hub id.
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
    """A trained reward model, its tokenizer, and its checked directory, or the snapshot of a Hub id.

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
