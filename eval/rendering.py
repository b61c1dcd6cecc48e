"""Prompts and completions as tokens: the one place where the instruments apply a chat template.

A prompt is a string, which is text without a template, or a conversation, a list of {"role", "content"}.
The tokens are those that TRL's trainers make of the same data, so a model is measured on what it was
trained on.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from trueup.recipes.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
Text: TypeAlias = str | Messages


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Text) -> list[int]:
    """The tokens up to where the reply begins; a conversation that ends with the assistant is continued.

    Raises:
        UsageError: a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    begun = prompt[-1]["role"] == "assistant"
    return _apply_template(tokenizer, prompt, add_generation_prompt=not begun, continue_final_message=begun)


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", prompt: Text, completion: Text, ended: bool = True
) -> list[int]:
    """The tokens of prompt and completion, the last one eos if the completion `ended`, and none if it was
    cut.

    Raises:
        UsageError: a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt + plain(completion))["input_ids"])
        if ids[-1:] == [tokenizer.eos_token_id]:
            ids.pop()
        return [*ids, tokenizer.eos_token_id] if ended else ids
    ids = _apply_template(tokenizer, prompt + as_message(completion))
    if ended or tokenizer.eos_token_id not in ids:
        return ids
    return ids[: len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)]


def plain(completion: Text) -> str:
    """The words of a completion."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def as_message(completion: Text) -> Messages:
    """A completion as the assistant's turn."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def as_completions(prompts: Sequence[Text], texts: Sequence[str]) -> list[Text]:
    """Sampled texts in the form of their prompts, as a reward function of TRL gets them."""
    pairs = zip(prompts, texts, strict=True)
    return [text if isinstance(prompt, str) else as_message(text) for prompt, text in pairs]


def _apply_template(tokenizer: "PreTrainedTokenizerBase", messages: Messages, **kwargs: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, and prompts are conversations; "
            "give prompts as plain strings, or a chat_template.jinja to the directory"
        )
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"])
