"""Every layout a data set comes in, recognised by its columns and converted in this one place.

A *layout* is what a file holds (Alpaca, ShareGPT, hh-rlhf, ...); a *form* is what a trainer reads, one of
TRL's:

    text                  text
    messages              messages                      [{"role", "content"}, ...], ends with the assistant
    prompt_completion     prompt, completion
    preference            prompt, chosen, rejected
    unpaired_preference   prompt, completion, label
    prompt                prompt

Chat layouts become conversations. Plain strings stay plain strings where the file has TRL's own columns
(`prompt` + `completion`, `prompt` + `chosen` + `rejected`, `prompt`), because there they mean text without a
template.

Layout converters are pure functions row -> rows of their kind, `SHAPES` turns a kind into the form asked for,
and `check` says what no trainer should see. All three raise `BadRow`, which carries no place: the reader
knows it.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from trueup.recipes.errors import TrueupError

Row = dict[str, Any]
Messages = list[dict[str, str]]
Form = Literal["text", "messages", "prompt_completion", "preference", "unpaired_preference", "prompt"]

FORMS: tuple[str, ...] = get_args(Form)

# What TRL gives a meaning to. A set's own column of such a name is never handed on beside a form it does not
# belong to: TRL takes any one of them to decide whether a row is conversational.
TRL_COLUMNS = {"text", "prompt", "completion", "chosen", "rejected", "messages", "conversations", "label"}

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


class BadRow(Exception):
    """A row that cannot be used.

    `reason` is the same for all rows with this fault (it is counted), `detail` belongs to this row.
    `harmless` rows are dropped and counted even where bad rows are errors.
    """

    def __init__(self, reason: str, detail: str = "", harmless: bool = False) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.harmless = harmless


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages to people."""
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# ------------------------------------------------------------------------------------------ fields of one row


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise BadRow(f"field '{column}' is missing", "it has " + (", ".join(row) or "no fields"))
    if row[column] is None:
        raise BadRow(f"field '{column}' is null")
    return row[column]


def _string(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise BadRow(f"field '{column}' is a {kind_of(value)}, not a string")
    return value


def _optional(row: Row, column: str) -> str:
    return "" if row.get(column) is None else _string(row, column)


def _messages(value: Any, column: str) -> Messages:
    """Messages in either spelling, {role, content} or ShareGPT's {from, value}.

    Only these two fields are kept, so that every row has one type. TRL's `maybe_convert_to_chatml` renames
    the fields but neither maps ShareGPT's roles nor looks at the values.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"field '{column}' is not a list of messages", f"it is {_short(value)}")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise BadRow(f"field '{column}' is not a list of messages", f"it holds {_short(message)}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            raise BadRow(f"field '{column}' has an unknown role", f"{role!r}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(
                f"field '{column}' has a message whose content is a {kind_of(content)}, not a string"
            )
        if content.strip() or ROLES[role] != "system":  # an empty system prompt is none
            messages.append({"role": ROLES[role], "content": content})
    if not messages:
        raise BadRow(f"field '{column}' has no message but an empty system prompt")
    return messages


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _asks(row: Row, question: str) -> Messages:
    """The question as a conversation, after the row's own system prompt if it has one."""
    system = _optional(row, "system")
    return [_says("system", system)] * bool(system.strip()) + [_says("user", question)]


def _answers(value: Any, column: str) -> Messages:
    """An answer given as a string, as one message or as a list of messages."""
    if isinstance(value, str):
        return [_says("assistant", value)]
    return _messages([value] if isinstance(value, dict) else value, column)


# --------------------------------------------------------------------------------------- layouts: row -> rows


def _text(row: Row) -> Iterable[Row]:
    yield {"text": _string(row, "text")}


def _chat(row: Row) -> Iterable[Row]:
    column = "messages" if "messages" in row else "conversations"
    yield {"messages": _asks(row, "")[:-1] + _messages(_value(row, column), column)}


def _prompt_completion(row: Row) -> Iterable[Row]:
    prompt, completion = _value(row, "prompt"), _value(row, "completion")
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        prompt, completion = _as_prompt(prompt), _answers(completion, "completion")
    yield {"prompt": prompt, "completion": completion}


def _as_prompt(value: Any) -> Messages:
    return [_says("user", value)] if isinstance(value, str) else _messages(value, "prompt")


_WRAPPED = re.compile(
    r"\s*Below is an instruction.*?### Instruction:\s*\n(?P<instruction>.*?)"
    r"(?:\n\s*### Input:\s*\n(?P<input>.*?))?\n\s*### Response:\s*",
    re.DOTALL,
)


def _unwrap(prompt: str) -> str:
    """The bare request inside Alpaca's "Below is an instruction ..." page, else the prompt unchanged.

    The page is a template of its own. Inside our chat template it would be a second one, and the same request
    would hash into another split than it does elsewhere.
    """
    page = _WRAPPED.fullmatch(prompt)
    return _join(page["instruction"].strip(), (page["input"] or "").strip()) if page else prompt


def _join(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _prompt_response(row: Row) -> Iterable[Row]:
    yield _pair(_asks(row, _unwrap(_string(row, "prompt"))), _string(row, "response"))


def _question_answer(row: Row) -> Iterable[Row]:
    yield _pair(_asks(row, _string(row, "question")), _string(row, "answer"))


def _alpaca(row: Row) -> Iterable[Row]:
    yield _pair(_alpaca_prompt(row), _string(row, "output"))


def _dolly(row: Row) -> Iterable[Row]:
    request = _join(_string(row, "instruction"), _optional(row, "context"))
    yield _pair(_asks(row, request), _string(row, "response"))


def _self_instruct(row: Row) -> Iterable[Row]:
    instances = _value(row, "instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise BadRow("field 'instances' is not a list of objects", f"it is {_short(instances)}")
    for instance in instances:
        yield _pair(
            _alpaca_prompt(instance | {"instruction": _value(row, "instruction")}),
            _string(instance, "output"),
        )


def _alpaca_prompt(row: Row) -> Messages:
    return _asks(row, _join(_string(row, "instruction"), _optional(row, "input")))


def _pair(prompt: Messages, answer: str) -> Row:
    return {"prompt": prompt, "completion": [_says("assistant", answer)]}


def _alpaca_preference(row: Row) -> Iterable[Row]:
    yield _preference(_alpaca_prompt(row), row)


def _question_preference(row: Row) -> Iterable[Row]:
    yield _preference(_asks(row, _string(row, "question" if "question" in row else "input")), row)


def _sharegpt_preference(row: Row) -> Iterable[Row]:
    yield _preference(_asks(row, "")[:-1] + _messages(_value(row, "conversations"), "conversations"), row)


def _prompt_preference(row: Row) -> Iterable[Row]:
    """TRL's own columns, as strings left as they are. UltraFeedback repeats the prompt in each dialogue."""
    values = [_value(row, column) for column in ("prompt", "chosen", "rejected")]
    if all(isinstance(value, str) for value in values):
        yield dict(zip(("prompt", "chosen", "rejected"), values, strict=True))
    else:
        yield _preference(_asks(row, "")[:-1] + _as_prompt(values[0]), row)


def _preference(prompt: Messages, row: Row) -> Row:
    chosen = _answers(_value(row, "chosen"), "chosen")
    rejected = _answers(_value(row, "rejected"), "rejected")
    if chosen[0]["role"] != "assistant":  # a whole dialogue: its own beginning is the prompt
        return _implicit(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit_preference(row: Row) -> Iterable[Row]:
    """The prompt is what both begin with: messages, hh-rlhf transcripts, or plain text (as TRL has it)."""
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        yield _implicit(_answers(chosen, "chosen"), _answers(rejected, "rejected"))
    elif _TURN.match(chosen) or _TURN.match(rejected):
        yield _implicit(_transcript(chosen, "chosen"), _transcript(rejected, "rejected"))
    else:
        yield _implicit(chosen, rejected)


def _implicit(chosen: Any, rejected: Any) -> Row:
    from trl.data_utils import extract_prompt

    if not chosen or not rejected:
        raise BadRow(f"field '{'rejected' if chosen else 'chosen'}' is empty")
    return dict(extract_prompt({"chosen": chosen, "rejected": rejected}))


_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")


def _transcript(text: str, column: str) -> Messages:
    r"""Anthropic's "\n\nHuman: ... \n\nAssistant: ..." as messages; neighbours of one role are joined.

    A handful of hh-rlhf's dialogues have two assistant turns in a row, which most chat templates refuse.
    """
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        raise BadRow(
            f"field '{column}' is not a transcript", "expected '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        )
    messages: Messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append(_says(role, content.strip()))
    return messages


def _rated_chat(row: Row) -> Iterable[Row]:
    (chat,) = _chat(row)
    yield _cut(chat["messages"]) | {"label": _label(row)}


def _rated_completion(row: Row) -> Iterable[Row]:
    (pair,) = _prompt_completion(row)
    yield pair | {"label": _label(row)}


def _rated_alpaca(row: Row) -> Iterable[Row]:
    (pair,) = _alpaca(row)
    yield pair | {"label": _label(row)}


def _label(row: Row) -> bool:
    """True for a good answer. CSV knows only strings, many sets write 0 and 1."""
    value = _value(row, "label" if "label" in row else "kto_tag")
    known: dict[Any, bool] = {"true": True, "false": False, "1": True, "0": False}
    label = known.get(str(value).strip().lower())
    if label is None or isinstance(value, float):
        raise BadRow("field 'label' is neither true nor false", f"it is {_short(value)}")
    return label


def _prompt(row: Row) -> Iterable[Row]:
    prompt = _value(row, "prompt")
    yield {"prompt": prompt if isinstance(prompt, str) else _asks(row, "")[:-1] + _messages(prompt, "prompt")}


@dataclass(frozen=True)
class Layout:
    """How one family of files looks (`columns`, all present; `without`, none present) and what it holds
    (`kind`).
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Iterable[Row]]
    optional: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def fits(self, found: Iterable[str]) -> bool:
        found = set(found)
        return found.issuperset(self.columns) and found.isdisjoint(self.without)


_COMPLETED = "prompt_completion"
_PAIR = ("chosen", "rejected")
_SYSTEM = ("system",)
_LABELS = ("label", "kto_tag")

# The first that fits is taken, so what needs more columns stands before what needs fewer. `without` keeps
# rated and compared answers from being read as examples to imitate.
LAYOUTS = (
    Layout("rated messages", "unpaired_preference", ("messages", "label"), _rated_chat, _SYSTEM),
    Layout("rated ShareGPT", "unpaired_preference", ("conversations", "label"), _rated_chat, _SYSTEM),
    Layout("rated completions", "unpaired_preference", ("prompt", "completion", "label"), _rated_completion),
    # LLaMA-Factory's name for the label.
    Layout("rated messages", "unpaired_preference", ("messages", "kto_tag"), _rated_chat, _SYSTEM),
    Layout("rated ShareGPT", "unpaired_preference", ("conversations", "kto_tag"), _rated_chat, _SYSTEM),
    Layout(
        "rated completions", "unpaired_preference", ("prompt", "completion", "kto_tag"), _rated_completion
    ),
    Layout(
        "rated Alpaca",
        "unpaired_preference",
        ("instruction", "output", "kto_tag"),
        _rated_alpaca,
        ("input", "system"),
    ),
    Layout("ShareGPT pairs", "preference", ("conversations", *_PAIR), _sharegpt_preference, _SYSTEM),
    Layout("Alpaca pairs", "preference", ("instruction", *_PAIR), _alpaca_preference, ("input", "system")),
    Layout("question pairs", "preference", ("question", *_PAIR), _question_preference, _SYSTEM),
    Layout("input pairs", "preference", ("input", *_PAIR), _question_preference, _SYSTEM),  # distilabel
    Layout("prompt pairs", "preference", ("prompt", *_PAIR), _prompt_preference, _SYSTEM),
    Layout("pairs of dialogues", "preference", _PAIR, _implicit_preference),
    Layout("messages", "messages", ("messages",), _chat, _SYSTEM, without=_LABELS),
    Layout("ShareGPT", "messages", ("conversations",), _chat, _SYSTEM, without=(*_LABELS, *_PAIR)),
    Layout("completions", _COMPLETED, ("prompt", "completion"), _prompt_completion, without=_LABELS),
    Layout("responses", _COMPLETED, ("prompt", "response"), _prompt_response, _SYSTEM),
    Layout("questions and answers", _COMPLETED, ("question", "answer"), _question_answer, _SYSTEM),
    Layout("Alpaca", _COMPLETED, ("instruction", "output"), _alpaca, ("input", "system"), ("kto_tag",)),
    Layout("Dolly", _COMPLETED, ("instruction", "response"), _dolly, ("context", "system")),
    Layout("self-instruct", _COMPLETED, ("instruction", "instances"), _self_instruct),
    Layout("text", "text", ("text",), _text),
    Layout("prompts", "prompt", ("prompt",), _prompt, _SYSTEM),
)


# --------------------------------------------------------------------------------------- shapes: kind -> form


def _cut(messages: Messages) -> Row:
    """A dialogue as prompt and completion: the completion is its last turn, which must be the assistant's."""
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant", f"last turn: {messages[-1]['role']}")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _request(messages: Messages) -> Row:
    return {"prompt": messages[:-1] if messages[-1]["role"] == "assistant" else messages}


def _dialogue(prompt: Any, completion: Any) -> Row:
    return {"messages": _as_prompt(prompt) + _answers(completion, "completion")}


def _same(row: Row) -> list[Row]:
    return [row]


# For each form, the kinds it can be made from, the nearest first. Answers that were rated are never examples
# to imitate, so nothing leads from unpaired_preference to messages.
SHAPES: dict[str, dict[str, Callable[[Row], list[Row]]]] = {
    "text": {"text": _same},
    "messages": {
        "messages": _same,
        "prompt_completion": lambda row: [_dialogue(row["prompt"], row["completion"])],
        "preference": lambda row: [_dialogue(row["prompt"], row["chosen"])],
    },
    "prompt_completion": {
        "prompt_completion": _same,
        "messages": lambda row: [_cut(row["messages"])],
        "preference": lambda row: [{"prompt": row["prompt"], "completion": row["chosen"]}],
    },
    "preference": {"preference": _same},
    "unpaired_preference": {
        "unpaired_preference": _same,
        "preference": lambda row: [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
            {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
        ],
    },
    "prompt": {
        "prompt_completion": lambda row: [{"prompt": row["prompt"]}],
        "messages": lambda row: [_request(row["messages"])],
        "preference": lambda row: [{"prompt": row["prompt"]}],
        "unpaired_preference": lambda row: [{"prompt": row["prompt"]}],
        "prompt": _same,  # last: what stands beside a prompt tells how the prompt is written
    },
}


def recognise(found: Iterable[str], form: str, where: str) -> Layout:
    """The layout of a file with these columns, as a source for `form`.

    Raises TrueupError naming `where`, the columns found, the nearest names, and the layouts that would do.
    """
    found = list(dict.fromkeys(found))
    for kind in SHAPES[form]:
        for layout in LAYOUTS:
            if layout.kind == kind and layout.fits(found):
                return layout
    possible = [layout for layout in LAYOUTS if layout.kind in SHAPES[form]]
    known = sorted({column for layout in possible for column in layout.columns} - set(found))
    near = [
        (name, match)
        for name in found
        for match in difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    ]
    other = next((layout for layout in LAYOUTS if layout.fits(found)), None)
    raise TrueupError(
        f"{where}: its columns ({', '.join(found) or 'none'}) cannot be read as {form}."
        + (f" They hold {other.kind} ({other.name}), which does not give {form}." if other else "")
        + "".join(f" Did you mean '{match}' where it has '{name}'?" for name, match in near)
        + f" Layouts that do: {'; '.join(' + '.join(layout.columns) for layout in possible)}."
        + (" Or name the column with the text: dataset_text_field." if form == "text" else "")
    )


def convert(row: Row, layout: Layout, form: str) -> list[Row]:
    """One row of a file as rows of `form`, checked; other columns ride along for the scorers.

    Asked for prompts, the answer stays beside them under its own name (`answer`, `output`, ...), because it
    is what a scorer compares with, unless TRL gives that name a meaning.
    """
    shaped = []
    for found in layout.convert(row):
        if form.endswith("preference") and "chosen" in found and found["chosen"] == found["rejected"]:
            raise BadRow("chosen and rejected are equal", harmless=True)
        shaped += SHAPES[form][layout.kind](found)
    for shape in shaped:
        check(shape, form)
    used = used_columns(layout, form)
    extra = {name: value for name, value in row.items() if name not in used}
    return [shape | extra for shape in shaped]


@lru_cache
def used_columns(layout: Layout, form: str) -> frozenset[str]:
    """The columns not handed on as they are: those the conversion used, and all that TRL gives a meaning."""
    used = {*layout.columns, *layout.optional}
    return frozenset(TRL_COLUMNS | (used & _PROMPT_COLUMNS if form == "prompt" else used))


_PROMPT_COLUMNS = {"instruction", "input", "context", "question", "system", "instances"}


def check(row: Row, form: str) -> None:
    """What is empty or ends with the wrong speaker is no row of `form`: BadRow."""
    for column, value in row.items():
        if value == []:
            raise BadRow("there is no prompt before the answer")
        if isinstance(value, str) and not value.strip():
            raise BadRow(f"field '{column}' is empty")
        if isinstance(value, list) and not all(turn["content"].strip() for turn in value):
            raise BadRow(f"'{column}' has an empty turn")
    if form == "messages" and row["messages"][-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant")
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with the user", f"last turn: {prompt[-1]['role']}")
