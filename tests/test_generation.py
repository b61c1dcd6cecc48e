"""Replies that grow: the same text as the sampler's, whoever else is being answered."""

from dataclasses import replace
from typing import Any

import eval_models
import pytest
import torch
from app_models import Parrot

from trueup.app.generation import Generation, ReplySettings, stream
from trueup.eval.sampler import SamplingSettings, sample
from trueup.recipes.errors import UsageError

PROMPT = [{"role": "user", "content": "what?"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return eval_models.policy(max_position_embeddings=96)


def reply(model: Any, prompt: Any = PROMPT, stop: Any = (), **settings: Any) -> Generation:
    found = Generation(model, eval_models.tokenizer(), prompt, ReplySettings(**settings), stop)
    list(stream([found]))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 1.0, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 4},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, "continue me"], ids=["chat", "text"])
def test_the_text_is_what_the_sampler_samples(model: Any, prompt: Any, settings: dict[str, Any]) -> None:
    ours = reply(model, prompt, max_new_tokens=24, **settings)
    [theirs] = sample(
        model,
        eval_models.tokenizer(),
        [prompt],
        SamplingSettings(**{"max_new_tokens": 24, "top_p": 0.95} | settings),
    )
    assert (ours.ids, ours.text, ours.sample.ended) == (theirs.ids, theirs.text, theirs.ended)
    assert ours.finish == ("stop" if theirs.ended else "length")


def test_replies_side_by_side_are_those_of_each_alone(model: Any) -> None:
    settings = [ReplySettings(max_new_tokens=20, seed=seed, temperature=1.0) for seed in range(3)]
    together = [Generation(model, eval_models.tokenizer(), PROMPT, one) for one in settings]
    list(stream(together))
    assert [one.ids for one in together] == [
        reply(model, max_new_tokens=20, seed=seed, temperature=1.0).ids for seed in range(3)
    ]
    assert len({tuple(one.ids) for one in together}) == 3


def test_the_repetition_penalty_is_transformers_own(model: Any) -> None:
    ours = reply(model, max_new_tokens=30, temperature=0.0, repetition_penalty=1.6)
    prompt = torch.tensor([ours.prompt_ids])
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
        repetition_penalty=1.6, eos_token_id=eval_models.tokenizer().eos_token_id,
    )  # fmt: skip
    assert ours.ids == theirs[0, len(ours.prompt_ids) :].tolist()
    assert ours.ids != reply(model, max_new_tokens=30, temperature=0.0).ids


def test_a_reply_ends_at_a_stop_word_which_is_never_shown() -> None:
    parrot = Parrot(["one ", "two ", "END", " three"])
    found = Generation(parrot, parrot.tokenizer, PROMPT, ReplySettings(), stop=["two E"])
    shown = [found.text for _ in stream([found])]
    assert (found.text, found.finish) == ("one ", "stop")
    assert not [text for text in shown if "t" in text]


def test_a_character_is_shown_when_all_its_bytes_are_there() -> None:
    parrot = Parrot([])
    parrot.script = [
        *parrot.tokenizer("é🙂", add_special_tokens=False)["input_ids"],
        parrot.tokenizer.eos_token_id,
    ]
    found = Generation(parrot, parrot.tokenizer, PROMPT, ReplySettings())
    seen = []
    while found.finish is None:
        found.step()
        seen.append(found.text)
    assert list(dict.fromkeys(seen)) == ["", "é", "é🙂"]


def test_one_that_fails_does_not_stop_the_others(model: Any) -> None:
    parrot = Parrot(["fine"])
    broken = Parrot(["bad", "worse"])
    broken.script = broken.script[:1]  # asked for more, it raises
    growing = [Generation(one, one.tokenizer, PROMPT, ReplySettings()) for one in (broken, parrot)]
    list(stream(growing))
    assert [one.finish for one in growing] == ["failed", "stop"]
    assert isinstance(growing[0].error, IndexError)
    assert growing[1].text == "fine"


def test_a_long_conversation_loses_its_oldest_turns_and_a_long_prompt_is_refused(model: Any) -> None:
    turns = [{"role": role, "content": "x" * 20} for _ in range(6) for role in ("user", "assistant")]
    assert reply(model, [*turns, *PROMPT], max_new_tokens=8).ids
    with pytest.raises(UsageError, match="tokens, and the model takes 96"):
        reply(model, "x" * 200)


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": 0}, {"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(ReplySettings(), **wrong)
