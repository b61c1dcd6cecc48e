"""A model behind lm-eval's interface: tokens, log-likelihoods and replies against computations by hand."""

import copy
from pathlib import Path
from typing import Any

import eval_models
import pytest
import torch
from harness_models import TEXTS, nats, request
from jinja2.exceptions import TemplateError
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from trueup.eval import harness_model
from trueup.eval.harness_model import HarnessModel, Lengths
from trueup.eval.rendering import encode_prompt

PAIRS = [
    ("", " alone"),
    ("a", " b"),
    ("what is wet", " rain"),
    ("what is wet", " sand"),
    ("trailing ", "x" * 30),
]


def harness(model: Any = None, **options: Any) -> HarnessModel:
    return HarnessModel(eval_models.policy() if model is None else model, eval_models.tokenizer(), **options)


def greedy_ids(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, one plain forward for each."""
    said = list(ids)
    for _ in range(count):
        with torch.no_grad():
            said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(ids) :]


def test_texts_begin_as_they_did_in_training() -> None:
    tokenizer = eval_models.tokenizer()
    asked = harness()
    bos = tokenizer.bos_token_id
    assert asked.tok_encode("ab") == tokenizer("ab")["input_ids"] == [bos, *asked.tok_encode("ab", False)]
    assert harness(add_bos_token=False).tok_encode("ab") == asked.tok_encode("ab", False)
    conversation = [{"role": "user", "content": "hi"}]
    rendered = asked.apply_chat_template(conversation)
    assert asked.tok_encode(rendered) == encode_prompt(tokenizer, conversation)  # one bos, not two


def test_a_template_without_system_turns_hears_it_from_the_user() -> None:
    asked = harness()
    asked.tokenizer = copy.deepcopy(eval_models.tokenizer())
    asked.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}|{% endfor %}"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert asked.apply_chat_template(turns) == "user: Be brief.\n\nhi|"
    with pytest.raises(TemplateError):
        harness().apply_chat_template([{"role": "nobody", "content": "hi"}])


@pytest.mark.parametrize(("family", "expected"), [("gpt", True), ("gpt2", False)])
def test_where_the_tokenizer_puts_no_bos_the_model_decides(
    family: str, expected: bool, tmp_path: Path
) -> None:
    """Our pretraining puts it whatever the tokenizer does; GPT-2 was trained without."""
    eval_models.tokenizer().save_pretrained(tmp_path)
    silent = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    silent.backend_tokenizer.post_processor = None
    assert silent("ab")["input_ids"][0] != silent.bos_token_id
    assert HarnessModel(eval_models.policy(family), silent).add_bos_token is expected


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama"])
def test_log_likelihoods_are_those_of_a_plain_forward_in_any_batch(family: str) -> None:
    model = eval_models.policy(family)
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    alone = harness(model, batch_size=1).loglikelihood(requests)
    together = harness(model, batch_size=8).loglikelihood(requests)
    tokens = harness(model).tok_encode
    for (context, answer), one, other in zip(PAIRS, alone, together, strict=True):
        whole, before = tokens(context + answer), tokens(context.rstrip())
        expected = nats(model, before, whole[len(before) :])
        assert one[0] == pytest.approx(expected, abs=1e-4)
        assert other[0] == pytest.approx(expected, abs=1e-4)
        assert one[1] == other[1]


def test_little_memory_does_not_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    plenty = harness().loglikelihood(requests)
    monkeypatch.setitem(harness_model.CHUNK_ELEMENTS, "cpu", 1)
    for one, other in zip(harness().loglikelihood(requests), plenty, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_greedy_is_what_the_model_would_say() -> None:
    model = eval_models.policy()
    asked = harness(model)
    context = asked.tok_encode("hello")
    said = greedy_ids(model, context, 3)
    scored = asked._loglikelihood_tokens([(None, context, said), (None, context, [*said[:2], said[2] ^ 1])])
    assert [greedy for _, greedy in scored] == [True, False]


def test_where_lm_evals_own_model_is_right_we_agree_with_it() -> None:
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    for one, other in zip(
        harness(model).loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-4)


def test_rolling_text_is_scored_from_its_first_token_and_bos_is_not_scored() -> None:
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    requests = [request("loglikelihood_rolling", text) for text in TEXTS]
    ours = harness(model, batch_size=3).loglikelihood_rolling(requests)
    bos = [tokenizer.bos_token_id]
    expected = [nats(model, bos, tokenizer(text)["input_ids"][1:]) for text in TEXTS]
    assert ours == pytest.approx(expected, abs=1e-3)
    # lm-eval's own scores a second bos as well, which is what sets ours apart; should it ever stop, we agree.
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal").loglikelihood_rolling(requests)
    with_bos = [nats(model, bos, tokenizer(text)["input_ids"]) for text in TEXTS]
    assert theirs == pytest.approx(with_bos, abs=1e-3)


def test_what_does_not_fit_is_cut_counted_and_long_answers_are_scored_in_pieces() -> None:
    model = eval_models.policy()  # its context is 128 tokens, and a token is a byte
    asked = harness(model)
    [(cut, _), (long, _)] = asked.loglikelihood(
        [request("loglikelihood", "q" * 200, " yes"), request("loglikelihood", "why?", " b" * 100)]
    )
    tokens = asked.tok_encode("q" * 200 + " yes", False)[-129:]
    assert cut == pytest.approx(nats(model, tokens[:-4], tokens[-4:]), abs=1e-3)
    answer = asked.tok_encode(" b" * 100, False)
    context = asked.tok_encode("why?")[-1:]
    first = nats(model, context, answer[:128])
    rest = nats(model, answer[-129:128], answer[128:])  # the last window is as wide as the context
    assert long == pytest.approx(first + rest, abs=1e-3)
    assert asked.lengths == Lengths(requests=2, truncated=2, tokens_lost=201 + 4 - 129 + 4, in_pieces=1)


def test_an_empty_text_costs_nothing() -> None:
    assert harness().loglikelihood_rolling([request("loglikelihood_rolling", "")]) == [0.0]


PROMPTS = ["a", "tell me of the sea", "x y z", "of stones, and of rain, and of the wind"]


def test_replies_are_the_same_alone_and_in_a_batch() -> None:
    model = eval_models.policy()
    requests = [request("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in PROMPTS]
    together = harness(model, batch_size=4).generate_until(requests)
    assert harness(model, batch_size=1).generate_until(requests) == together
    assert len(set(together)) > 1


def test_a_stop_string_of_several_tokens_ends_a_reply() -> None:
    model = eval_models.policy()
    free = [request("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in PROMPTS]
    said = harness(model).generate_until(free)
    stop = said[0][3:6]
    held = [request("generate_until", text, {"until": [stop], "max_gen_toks": 12}) for text in PROMPTS]
    for size in (1, 4):
        replies = harness(model, batch_size=size).generate_until(held)
        assert replies == [text.split(stop)[0] for text in said]
        assert replies[0] == said[0][: said[0].index(stop)]


def test_the_end_of_turn_ends_a_reply_and_nothing_said_after_it_is_read() -> None:
    model, tokenizer = eval_models.policy(), eval_models.tokenizer()
    asked = [request("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in PROMPTS]
    ids = greedy_ids(model, tokenizer(PROMPTS[0])["input_ids"], 12)
    assert harness(model).generate_until(asked)[0] == tokenizer.decode(ids)
    model.generation_config.eos_token_id = [ids[4]]  # a chat model's end of turn, which is not its eos
    ended = harness(model, batch_size=4).generate_until(asked)
    assert ended[0] == tokenizer.decode(ids[: ids.index(ids[4]) + 1])


def test_a_reply_leaves_room_for_its_question() -> None:
    asked = harness()
    asked.generate_until([request("generate_until", "w " * 100, {"until": [], "max_gen_toks": 1000})])
    assert asked.lengths == Lengths(requests=1, truncated=1, tokens_lost=201 - 64, shortened=1)
