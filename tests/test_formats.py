"""Layouts in, TRL's formats out: one example per layout, and what makes a row bad."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.data_utils import is_conversational

from trueup.base.formats import FORMS, LAYOUTS, SHAPES, BadRow, convert, recognise
from trueup.recipes.errors import TrueupError

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "So."}
POOR = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(row: dict[str, Any], form: str) -> list[dict[str, Any]]:
    return convert(row, recognise(row, form, "here"), form)


PAIRS = [
    {"instruction": "Why?", "input": "", "output": "x", "chosen": "So.", "rejected": "No."},
    {"question": "Why?", "chosen": "So.", "rejected": "No."},
    {"system": "", "input": "Why?", "chosen": "So.", "rejected": "No."},  # distilabel
    {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
    {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, POOR]},  # UltraFeedback
    {"prompt": [USER], "chosen": "So.", "rejected": "No."},
    {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
]


@pytest.mark.parametrize("row", PAIRS, ids="+".join)
def test_every_preference_layout_gives_the_same_row(row: dict[str, Any]) -> None:
    (pair,) = read(row, "preference")
    assert {name: pair[name] for name in ("prompt", "chosen", "rejected")} == {
        "prompt": [USER],
        "chosen": [GOOD],
        "rejected": [POOR],
    }


PAGE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nWhy?\n\n### Response:\n"
)
ANSWERED = [
    {"messages": [USER, GOOD]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"instruction": "Why?", "input": "", "output": "So."},
    {"instruction": "Why?", "context": None, "response": "So."},
    {"instruction": "Why?", "instances": [{"input": "", "output": "So."}]},
    {"prompt": "Why?", "response": "So."},
    {"prompt": PAGE, "response": "So."},
    {"question": "Why?", "answer": "So."},
    {"prompt": [USER], "completion": [GOOD]},
    *PAIRS[1:],
]


@pytest.mark.parametrize("row", ANSWERED, ids="+".join)
def test_every_layout_with_answers_gives_the_same_chat(row: dict[str, Any]) -> None:
    assert [chat["messages"] for chat in read(row, "messages")] == [[USER, GOOD]]
    (pair,) = read(row, "prompt_completion")
    assert (pair["prompt"], pair["completion"]) == ([USER], [GOOD])
    assert [request["prompt"] for request in read(row, "prompt")] == [[USER]]


RATED = [
    {"messages": [USER, GOOD]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
]


@pytest.mark.parametrize("label", [True, 1, "true", "1", "True"])
def test_rated_answers(label: Any) -> None:
    expected = {"prompt": [USER], "completion": [GOOD], "label": True}
    for row in (*RATED, {"prompt": [USER], "completion": [GOOD]}):
        assert read(row | {"label": label}, "unpaired_preference") == [expected]
    alpaca = {"instruction": "Why?", "input": "", "output": "So."}
    for row in (*RATED, alpaca, {"prompt": [USER], "completion": [GOOD]}):  # LLaMA-Factory's
        assert read(row | {"kto_tag": label}, "unpaired_preference") == [expected]


def test_a_pair_gives_two_rated_answers() -> None:
    good, poor = read(PAIRS[2], "unpaired_preference")
    assert (good["completion"], good["label"]) == ([GOOD], True)
    assert (poor["completion"], poor["label"]) == ([POOR], False)


def test_rated_answers_are_never_examples() -> None:
    with pytest.raises(TrueupError, match="hold unpaired_preference"):
        read({"messages": [USER, GOOD], "label": False}, "messages")
    with pytest.raises(TrueupError, match="hold unpaired_preference"):
        read({"prompt": "Why?", "completion": "So.", "label": False}, "prompt_completion")
    for row in (*RATED, {"instruction": "Why?", "output": "So."}):
        with pytest.raises(TrueupError, match="hold unpaired_preference"):
            read(row | {"kto_tag": False}, "messages")


def test_the_answer_meant_as_example_goes_before_the_chosen_one() -> None:
    (chat,) = read(PAIRS[0], "messages")
    assert chat == {"messages": [USER, {"role": "assistant", "content": "x"}]}


def test_trls_own_columns_stay_plain_text() -> None:
    pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert read(pair, "preference") == [pair]
    row = {"prompt": "The sky is", "completion": " blue."}
    assert read(row, "prompt_completion") == [row]
    assert read({"prompt": "The sky is"}, "prompt") == [{"prompt": "The sky is"}]
    # As a chat they have to become one.
    (chat,) = read(row, "messages")
    assert is_conversational(chat)


def test_an_alpaca_input_follows_the_instruction() -> None:
    (row,) = read({"instruction": "Spell it.", "input": "freind", "output": "friend"}, "prompt")
    assert row["prompt"] == [{"role": "user", "content": "Spell it.\n\nfreind"}]
    page = PAGE.replace("\n\n### Response", "\n\n### Input:\nthat\n\n### Response")
    (row,) = read({"prompt": page, "response": "So."}, "prompt")
    assert row["prompt"] == [{"role": "user", "content": "Why?\n\nthat"}]


def test_system_prompts_lead_and_empty_ones_are_none() -> None:
    for row in (
        {"messages": [SYSTEM, USER, GOOD]},
        {"system": "Be brief.", "question": "Why?", "answer": "So."},
    ):
        assert read(row, "messages") == [{"messages": [SYSTEM, USER, GOOD]}]
    assert read({"system": "", "messages": [SYSTEM | {"content": " "}, USER, GOOD]}, "messages") == [
        {"messages": [USER, GOOD]}
    ]


def test_a_prompt_keeps_its_system_prompt_as_it_does_in_pairs() -> None:
    row = {"system": "Be brief.", "prompt": [USER]}
    assert read(row, "prompt") == [{"prompt": [SYSTEM, USER]}]
    (pair,) = read(row | {"chosen": [GOOD], "rejected": [POOR]}, "preference")
    assert pair["prompt"] == [SYSTEM, USER]


def test_self_instruct_gives_one_row_per_instance() -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]}
    prompts = [pair["prompt"][0]["content"] for pair in read(row, "prompt_completion")]
    assert prompts == ["Add.\n\n1", "Add.\n\n3"]


def test_a_transcripts_prompt_is_the_common_beginning() -> None:
    start = "\n\nHuman: A\n\nAssistant: B\n\nAssistant: B2\n\nHuman: C\n\nAssistant: "
    (pair,) = read({"chosen": start + "D", "rejected": start + "E: \n\nhm"}, "preference")
    assert [turn["content"] for turn in pair["prompt"]] == ["A", "B\n\nB2", "C"]
    assert [turn["role"] for turn in pair["prompt"]] == ["user", "assistant", "user"]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("D", "E: \n\nhm")


def test_other_columns_ride_along_for_the_scorers() -> None:
    row = {"question": "1+1?", "answer": "2", "truth": {"n": 2}, "text": "not ours"}
    assert read(row, "messages")[0].keys() == {"messages", "truth"}
    assert read(row, "prompt") == [
        {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2", "truth": {"n": 2}}
    ]


def test_no_foreign_trl_column_reaches_the_trainer() -> None:
    """UltraChat has `prompt` beside `messages`: TRL would take either to tell whether the row is a chat."""
    assert read({"prompt": "Why?", "prompt_id": "7", "messages": [USER, GOOD]}, "messages") == [
        {"messages": [USER, GOOD], "prompt_id": "7"}
    ]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"text": ""}, "text", "field 'text' is empty"),
    ({"text": " \n"}, "text", "field 'text' is empty"),
    ({"text": None}, "text", "field 'text' is null"),
    ({"text": ["a"]}, "text", "field 'text' is a list, not a string"),
    ({"messages": []}, "messages", "not a list of messages"),
    ({"messages": "hi"}, "messages", "not a list of messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown role .*'robot'; known: user"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages", "content is a null"),
    ({"messages": [USER]}, "messages", "does not end with the assistant"),
    ({"messages": [USER, GOOD | {"content": ""}]}, "messages", "'messages' has an empty turn"),
    ({"messages": [GOOD]}, "prompt_completion", "no prompt before the answer"),
    ({"messages": [SYSTEM, GOOD]}, "prompt", "prompt does not end with the user"),
    ({"instruction": "a", "output": 3}, "messages", "field 'output' is a number, not a string"),
    ({"question": "a", "answer": ""}, "prompt_completion", "'completion' has an empty turn"),
    ({"prompt": "a", "completion": "b", "label": "maybe"}, "unpaired_preference", "neither true nor false"),
    ({"prompt": "a", "completion": "b", "label": 0.5}, "unpaired_preference", "neither true nor false"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preference", "chosen and rejected are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "unpaired_preference", "chosen and rejected are equal"),
    ({"chosen": "\n\nHuman: a", "rejected": "b"}, "preference", "'rejected' is not a transcript"),
    ({"chosen": [USER, GOOD], "rejected": [SYSTEM, POOR]}, "preference", "no prompt before the answer"),
    ({"chosen": "", "rejected": "b"}, "preference", "field 'chosen' is empty"),
    ({"instruction": "a", "instances": "b"}, "messages", "'instances' is not a list of objects"),
]


@pytest.mark.parametrize(("row", "form", "reason"), BAD)
def test_bad_rows_say_why(row: dict[str, Any], form: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read(row, form)


def test_a_missing_field_is_named_with_those_there_are() -> None:
    layout = recognise(["prompt", "chosen", "rejected"], "preference", "here")
    with pytest.raises(BadRow, match=r"field 'chosen' is missing \(it has prompt, rejected\)"):
        convert({"prompt": "a", "rejected": "b"}, layout, "preference")


def test_equal_answers_are_harmless_and_no_matter_to_prompts() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(BadRow) as caught:
        read(row, "preference")
    assert caught.value.harmless
    assert read(row, "prompt") == [{"prompt": "a"}]


def test_unknown_columns_are_answered_with_the_nearest() -> None:
    with pytest.raises(TrueupError, match=r"a\.jsonl: its columns \(prompt, choosen, rejected\)") as caught:
        recognise(["prompt", "choosen", "rejected"], "preference", "a.jsonl")
    assert "Did you mean 'chosen' where it has 'choosen'?" in str(caught.value)
    assert "prompt + chosen + rejected" in str(caught.value)
    with pytest.raises(TrueupError, match="dataset_text_field"):
        recognise(["content"], "text", "a.jsonl")


def test_conversion_never_writes_into_its_row() -> None:
    row = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "n": [1]}
    before = repr(row)
    read(row, "messages")[0]["messages"][0]["content"] = "changed"
    assert repr(row) == before


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@given(
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    form=st.sampled_from([form for form in FORMS if "messages" in SHAPES[form]]),
)
def test_a_chat_reads_the_same_in_both_spellings(turns: list[tuple[str, str]], form: str) -> None:
    chat = [m for ask, answer in turns for m in (USER | {"content": ask}, GOOD | {"content": answer})]
    spelled = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in chat]
    one, other = read({"messages": chat}, form), read({"conversations": spelled}, form)
    assert one == other
    parts = one[0].get("messages") or one[0]["prompt"] + one[0].get("completion", chat[-1:])
    assert parts == chat  # nothing lost, nothing changed


@given(asked=TEXT, good=TEXT, poor=TEXT)
def test_a_dialogue_pair_gives_back_its_parts(asked: str, good: str, poor: str) -> None:
    assume(good != poor)
    ask, say = USER | {"content": asked}, [GOOD | {"content": text} for text in (good, poor)]
    (pair,) = read({"chosen": [ask, say[0]], "rejected": [ask, say[1]]}, "preference")
    assert pair == {"prompt": [ask], "chosen": say[:1], "rejected": say[1:]}


def test_every_layout_serves_some_form() -> None:
    for layout in LAYOUTS:
        assert any(
            recognise(layout.columns, form, "here") is layout for form in FORMS if layout.kind in SHAPES[form]
        )
