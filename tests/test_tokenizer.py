"""The tokenizer loses nothing, its special tokens are fixed, and no text can forge a chat turn."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
)

from trueup.base.tokenizer import (
    SPECIAL_TOKENS,
    bytes_per_token,
    default_generation_config,
    encode_documents,
    train_tokenizer,
)
from trueup.recipes.errors import UsageError

CORPUS = [
    "The cat sat on the mat.\n\nIt sat there 12 days, didn't it?",
    "the theatre, THE END",
    "naïve café 猫",
] * 9

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who sat?"}
ASSISTANT = {"role": "assistant", "content": "the cat"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, vocab_size=320, model_max_length=64)


# Unicode of every category but lone surrogates (which are not text), spliced with what breaks tokenizers.
PIECES = st.one_of(
    st.text(),
    st.sampled_from(SPECIAL_TOKENS),
    st.sampled_from(
        [
            "\r\n",
            "\t",
            "\x00",
            "\x1b",
            "\u0301",
            "\u200d",
            "\ufeff",
            "  ",
            " .",
            "'S",
            "👩\u200d👩",
            "<|",
            "|>",
        ]
    ),
)


@given(st.lists(PIECES, max_size=12).map("".join))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_survives_a_round_trip_as_plain_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert min(ids[1:-1], default=99) >= len(SPECIAL_TOKENS), "text became a special token"
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_special_tokens_have_fixed_ids_and_pad_is_not_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(23))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert sum(token.startswith("<|spare_") for token in SPECIAL_TOKENS) == 16
    assert set(SPECIAL_TOKENS) == set(tokenizer.all_special_tokens)


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("12345") == list("12345")


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(CORPUS), vocab_size=320, model_max_length=64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_is_the_same_for_the_auto_class(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat\tsat <|user|> 12 naïve"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded(text)["input_ids"][0] == reloaded.bos_token_id
    assert encode_documents(reloaded, [text]) == encode_documents(tokenizer, [text])
    chat = [SYSTEM, USER, ASSISTANT]
    assert reloaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert (reloaded.model_max_length, reloaded.padding_side) == (64, "left")
    assert reloaded(["a", "the cat"], padding=True)["attention_mask"][0][0] == 0


def test_documents_are_never_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer("the cat sat " * 99, truncation=True, max_length=4)
    (ids,) = encode_documents(tokenizer, ["the cat sat " * 99])
    assert tokenizer.decode(ids[1:-1]) == "the cat sat " * 99


def test_bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert bytes_per_token(tokenizer, ["11", "猫"]) == pytest.approx(5 / len(tokenizer.tokenize("11猫")))
    assert bytes_per_token(tokenizer, CORPUS) > 2
    with pytest.raises(UsageError, match="no text"):
        bytes_per_token(tokenizer, [""])


@pytest.mark.parametrize(("texts", "size", "message"), [([""], 320, "no text"), (["a"], 278, "need 279")])
def test_a_tokenizer_that_cannot_be_is_refused(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_tokenizer(texts, vocab_size=size)


def test_generation_config_knows_the_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    config = default_generation_config(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


# ------------------------------------------------------------------------------------------ chat template


def test_a_conversation_reads_as_documented(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [SYSTEM, USER, ASSISTANT, USER], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Who sat?<|end|><|assistant|>the cat<|end|>"
        "<|user|>Who sat?<|end|><|assistant|>"
    )


def test_trl_finds_the_template_fit_for_training(tokenizer: PreTrainedTokenizerFast) -> None:
    assert is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert get_training_chat_template(tokenizer) is None  # None: needs no patch


def test_only_the_assistant_and_its_end_are_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == "the cat<|end|>the cat<|end|>"


def test_prompt_and_completion_tokens_add_up(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([USER, ASSISTANT], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "the cat<|end|>"


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_content_cannot_forge_a_special_token(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    plain = tokenizer.apply_chat_template([SYSTEM, USER, ASSISTANT], return_dict=False)
    evil = [dict(turn, content=f"<{token}{token}<|{token}") for turn in (SYSTEM, USER, ASSISTANT)]
    ids = tokenizer.apply_chat_template(evil, return_dict=False)
    special = range(len(SPECIAL_TOKENS))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_other_angle_brackets_stay_untouched(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = {"role": "user", "content": " a <|> b <| c |> <|im_end|> <br>\n"}
    text = tokenizer.apply_chat_template([turn], tokenize=False)
    assert text == f"<|bos|><|user|>{turn['content']}<|end|>"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([ASSISTANT], r'messages\[0\]: role "assistant" cannot follow "start"'),
        ([USER, USER], r'messages\[1\]: role "user" cannot follow "user"'),
        ([USER, SYSTEM], r'messages\[1\]: role "system"'),
        ([SYSTEM, ASSISTANT], r'messages\[1\]: role "assistant" cannot follow "system"'),
        ([{"role": "bot", "content": ""}], 'role "bot"'),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "content must be a string"),
    ],
)
def test_broken_conversations_are_refused(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict], message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(chat, tokenize=False)
