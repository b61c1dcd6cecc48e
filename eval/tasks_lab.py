"""The lab's tasks for lm-eval: their rows, and what is not said in the YAML files of `tasks/`.

The rows are generated when a task is loaded, from seeds: there is no file to be missing, moved or outdated.
"""

from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from trueup.base.tokenizer import EOS
from trueup.recipes.lab.datasets import rows
from trueup.recipes.lab.gold import SUBSTANCE, TRUTH_COLUMNS, gold, gold_parts

Doc = dict[str, Any]


def lab_rows(name: str, options: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Dataset]:
    """A data set of the lab by split, as `custom_dataset` gives it to lm-eval.

    Args:
        name: as in a recipe's `dataset_name`, e.g. lab/facts.
        options: as in a recipe's `dataset_options`.
        metadata: of the task, which lm-eval hands to every such function.
    """
    splits = ("train", "validation", "test")
    return {split: Dataset.from_list(list(rows(name, split, **(options or {})))) for split in splits}


# -------------------------------------------------------------------------------------------- bits per byte


def whole_document(doc: Doc) -> str:
    """A text with its end: what pretraining learns from it."""
    return str(doc["text"]) + EOS


def score_document(doc: Doc, results: list[float]) -> dict[str, tuple[float, int]]:
    """(log-likelihood in nats, bytes): the end of a document costs bits, and has no bytes."""
    return {"bits_per_byte": (results[0], len(doc["text"].encode()))}


# --------------------------------------------------------------------------------------------- instructions


class Conversation(ConfigurableTask):
    """A task whose documents hold a conversation, `prompt`, of one turn or several."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def fewshot_context(self, doc: Doc, *args: Any, **kwargs: Any) -> str:
        """The conversation through the chat template; without it the turns, one under the other."""
        if kwargs.get("apply_chat_template"):
            return str(kwargs["chat_template"](doc["prompt"]))
        return "\n".join(message["content"] for message in doc["prompt"]) + "\n"


def score_reply(doc: Doc, results: list[str]) -> dict[str, float]:
    """What the gold scorer says of a reply, whole and by its parts of substance."""
    asked, said = [doc["prompt"]], [results[0]]
    truth = {name: [doc[name]] for name in TRUTH_COLUMNS}
    parts = gold_parts(asked, said, **truth)
    return {"gold": gold(asked, said, **truth)[0]} | {name: parts[name][0] for name in SUBSTANCE}
