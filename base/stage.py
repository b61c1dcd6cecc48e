"""What every recipe on TRL's classes shares: its keys, opening the model, checking the chat template.

@dataclass
class SFTRecipe(StageArguments, DataArguments, ModelConfig, SFTConfig): ...
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trueup.base import adapters
from trueup.base.data import data_parents
from trueup.base.eval_tasks import EvalTasksArguments, eval_tasks_contradictions
from trueup.base.hub_keys import HubArguments, hub_contradictions
from trueup.recipes.directory import Kind
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import is_hub_id, local_directory
from trueup.recipes.run import is_main_process


def key(default: Any, help_text: str, **metadata: Any) -> Any:
    """A recipe key: its default and meaning."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class StageArguments(EvalTasksArguments, HubArguments):
    """Keys of TRL and Transformers whose defaults are wrong for us, each with its reason. Goes first."""

    output_dir: str = key("", "Model directory to write.", required=True)
    model_name_or_path: str | None = key(
        None, "Model directory to start from, or Hub id (org/name, org/name@revision).", required=True
    )
    # PEFT knows the modules of famous architectures alone, and raises for any other.
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules to adapt; all-linear: all but the output layer."},
    )
    warmup_steps: float = key(0.02, "Steps of linear warm-up; below 1 a share of all steps.")
    # A held-out loss is what tells learning from memorising.
    eval_strategy: str = key(
        "epoch", "When the validation split is scored; no: never.", choices=["no", "steps", "epoch"]
    )
    # TRL's true costs a third more time, to save memory that small models do not need.
    gradient_checkpointing: bool | None = key(None, "The old name of activation_checkpointing.")
    # One to resume from, and one to fall back to should it be damaged.
    save_total_limit: int | None = key(2, "Checkpoints kept while training.")
    # True would hide a loss that is not finite; here it stops the run.
    logging_nan_inf_filter: bool = key(False, "Leave losses that are not finite out of the log.")
    include_num_input_tokens_seen: str | bool = key(
        "non_padding", "Count tokens for the record: all, non_padding or no."
    )
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Trackers: tensorboard, trackio, wandb, ..., all or none."}
    )

    resume_from_checkpoint: bool | str | None = key(
        None, "Default: the newest whole checkpoint of this recipe; false: none; or a checkpoint's path."
    )

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = adapters.contradictions(given)
        if given.get("max_steps", -1) > 0 and "num_train_epochs" in given:
            found.append(("num_train_epochs", "and max_steps both say how long to train; delete one"))
        if given.get("bf16") and given.get("fp16"):
            found.append(("fp16", "and bf16 exclude each other; bf16 needs no loss scaling, so prefer it"))
        if given.get("dataset_streaming") and given.get("max_steps", -1) < 1:
            found.append(("dataset_streaming", "needs max_steps: nobody knows how long a stream is"))
        if "eval_steps" in given and given.get("eval_strategy") != "steps":
            found.append(("eval_steps", "is read with eval_strategy: steps; add that"))
        return found + eval_tasks_contradictions(given) + hub_contradictions(given)

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The model it starts from, and the data sets that stages wrote."""
        return {"model_name_or_path": (start_model(self), "causal-lm"), **data_parents(self)}


@dataclass
class TokenPreview:
    """Documents as a stage would train them: what `trueup inspect RECIPE` shows."""

    documents: list[tuple[list[int], list[bool]]]  # token ids, and whether each is trained
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]  # on the whole data set: counts, trained fraction, truncation


def set_up(recipe: Any, config_class: Any) -> None:
    """What TRL's configs do after construction: call it in `__post_init__`."""
    for name in ("checkpointing", "checkpointing_kwargs"):  # the old names, of which Transformers warns
        old, new = f"gradient_{name}", f"activation_{name}"
        if getattr(recipe, new) is None:
            setattr(recipe, new, getattr(recipe, old))
        setattr(recipe, old, None)
    recipe.activation_checkpointing = bool(recipe.activation_checkpointing)
    ModelConfig.__post_init__(recipe)
    # TRL makes a lone name a string, which PEFT takes for a pattern of whole paths: [o_proj] matches nothing.
    target = recipe.lora_target_modules
    if isinstance(target, str) and target != "all-linear" and re.fullmatch(r"[\w.]+", target):
        recipe.lora_target_modules = [target]
    config_class.__post_init__(recipe)


# ---------------------------------------------------------------- what a trainer is made of


def trainer_config(config_class: type, values: Mapping[str, Any], work_dir: Path, **resolved: Any) -> Any:
    """The part of a recipe that is the trainer's own config, e.g. SFTConfig.

    Args:
        values: the recipe's values (`Recipe.values`).
        resolved: values that the stage worked out, which win.
    """
    names = {f.name for f in fields(config_class) if f.init}
    ours = {
        "output_dir": str(work_dir),
        "push_to_hub": False,  # publishing is a step of its own, after the stage; and so no token is
        "hub_token": None,  # pickled into the checkpoints
        "gradient_checkpointing": None,
        "gradient_checkpointing_kwargs": None,
        "activation_checkpointing": bool(
            values["activation_checkpointing"] or values["gradient_checkpointing"]
        ),
        "activation_checkpointing_kwargs": values["activation_checkpointing_kwargs"]
        or values["gradient_checkpointing_kwargs"],
    }
    return config_class(**{k: v for k, v in values.items() if k in names} | ours | resolved)


def start_model(recipe: Any) -> str:
    """What `model_name_or_path` names, with `model_revision` where that is a Hub id without one."""
    name, revision = str(recipe.model_name_or_path), getattr(recipe, "model_revision", None) or "main"
    return f"{name}@{revision}" if is_hub_id(name) and "@" not in name and revision != "main" else name


def load_tokenizer(recipe: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in the directory, or of the Hub id, that `model_name_or_path` names.

    Raises:
        UsageError: there is none, or it brings code of its own that the recipe does not trust.
    """
    with _loading(recipe):
        directory = local_directory(start_model(recipe), "model_name_or_path")
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=recipe.trust_remote_code)
    # Rows longer than the context are counted and cut; Transformers would warn of "indexing errors".
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_model(recipe: Any, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The model that `model_name_or_path` names, as ModelConfig's keys ask (dtype, attention, quantisation).

    Args:
        recipe: a stage's dataclass, built on ModelConfig.
        options: further arguments of from_pretrained, e.g. num_labels.

    Raises:
        UsageError: it brings code of its own that the recipe does not trust, or cannot be quantised here, or
            a package is missing that the recipe's attention needs.
    """
    if (quantized := adapters.quantization(recipe)) is not None:
        device = torch.accelerator.current_accelerator()
        options |= {"quantization_config": quantized, "device_map": {"": device}}
    with _loading(recipe):
        return auto_class.from_pretrained(
            local_directory(start_model(recipe), "model_name_or_path"),
            trust_remote_code=recipe.trust_remote_code,
            attn_implementation=recipe.attn_implementation,
            dtype=recipe.dtype,
            **options,
        )


@contextlib.contextmanager
def _loading(recipe: Any) -> Iterator[None]:
    name = recipe.model_name_or_path
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"model_name_or_path: {name} brings Python code of its own; read it, and if you trust it set "
            "trust_remote_code: true"
        ) from error
    except ImportError as error:
        attention = f" with attn_implementation: {recipe.attn_implementation}" * bool(
            recipe.attn_implementation
        )
        raise UsageError(f"model_name_or_path: {name} cannot be loaded here{attention}: {error}") from error
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model_name_or_path: {name} cannot be loaded: {reason}") from error


def held_length(max_length: int | None, config: Any, chosen: bool) -> int | None:
    """max_length, held to the model's context: beyond it a model was never trained.

    Args:
        config: the model's.
        chosen: whether the recipe names it, rather than leaving TRL's default of 1,024.

    Raises:
        UsageError: the recipe asks for more.
    """
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None or (max_length or context + 1) <= context:
        return max_length
    if chosen and max_length is not None:
        raise UsageError(
            f"max_length: {max_length:,} is more than the model's {context:,} positions; lower it"
        )
    if is_main_process():
        print(f"max_length: {context:,} (the model's context)", flush=True)
    return context


# ---------------------------------------------------------------- chat templates


def read_template(named: str | None) -> str | None:
    """The template in the file that `chat_template_path` names, or that it is itself; else None."""
    if named is None or "{%" in named or "{{" in named:
        return named
    return Path(named).read_text(encoding="utf-8") if Path(named).is_file() else None


def check_template(tokenizer: PreTrainedTokenizerBase, masked: bool) -> None:
    """Conversations need a chat template; to train answers alone it must mark them, their end included.

    Raises:
        UsageError: it does not, and TRL has no patched version of it.
    """
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    ours = "the file chat_template.jinja of any trueup model shows how"
    if tokenizer.chat_template is None:
        raise UsageError(
            "chat_template_path: the tokenizer has no chat template, so conversations cannot be written as "
            f"text; name one ({ours}), or use dataset_form: prompt_completion with plain strings"
        )
    if not masked:
        return
    try:
        template = get_training_chat_template(tokenizer)  # None: the tokenizer's own will do
    except ValueError as error:
        raise UsageError(
            "assistant_only_loss: the chat template does not mark what the assistant says; put "
            "{% generation %} ... {% endgeneration %} around it, its end of turn included "
            f"({ours}), or set it to false"
        ) from error
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise UsageError(
            "assistant_only_loss: the chat template leaves the end of turn outside {% generation %}, so the "
            f"model would never learn to stop; move it inside ({ours}), or set assistant_only_loss: false"
        )


@contextlib.contextmanager
def template_errors(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn what a chat template finds wrong with a conversation into a message that names the row.

    Args:
        rows: what is rendered in the block: `messages`, or `prompt` and the answers to it.
    """
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError:
        for number, row in enumerate(rows, start=1):
            for messages in _conversations(row):
                try:
                    tokenizer.apply_chat_template(messages, tokenize=False)
                except TemplateError as error:
                    raise TrueupError(
                        f"row {number} does not fit the chat template: {error}; correct or drop it: "
                        f"{json.dumps(messages, ensure_ascii=False)[:200]}"
                    ) from error
        raise


def _conversations(row: dict[str, Any]) -> Iterator[list[dict[str, str]]]:
    if "messages" in row:
        yield row["messages"]
    for answer in ("completion", "chosen", "rejected"):
        if answer in row:
            yield row.get("prompt", []) + row[answer]
