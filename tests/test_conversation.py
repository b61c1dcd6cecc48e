"""Conversations with several models: blindness, figures, trouble on one side, votes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from app_models import Parrot, make_arena, write_runs

from trueup.app.conversation import Arena, Conversation
from trueup.app.generation import ReplySettings
from trueup.eval.kl import log_ratios
from trueup.recipes.errors import UsageError

SHORT = ReplySettings(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def arena(runs: Path, tmp_path: Path) -> Arena:
    parrots = {"left-parrot": Parrot(["yes"]), "right-parrot": Parrot(["no"])}
    return make_arena(runs, tmp_path / "votes.sqlite", parrots)


def ask(
    arena: Arena, conversation: Conversation, text: str = "what?", settings: Any = SHORT, system: str = ""
) -> None:
    list(conversation.ask(arena.pool, text, settings, system))


def test_every_side_answers_each_turn_in_its_own_conversation(arena: Arena) -> None:
    talk = arena.begin(["sft", "dpo", "left-parrot"])
    ask(arena, talk, "one?")
    ask(arena, talk, "two?")
    for side in talk.sides:
        assert [turn["role"] for turn in side.messages] == ["user", "assistant"] * 2
        assert side.figures
    assert talk.sides[0].messages[1] != talk.sides[1].messages[1]
    assert talk.sides[2].messages[1]["content"] == "yes"
    assert not talk.votable


def test_the_system_prompt_and_the_turns_before_reach_the_model(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    parrot = arena.pool.loaded["left-parrot"].model
    call = Parrot.__call__

    def listening(self: Parrot, input_ids: Any, past_key_values: Any, **inputs: Any) -> Any:
        if self is parrot and input_ids.shape[1] > 1:
            seen.append(parrot.tokenizer.decode(input_ids[0]))
        return call(self, input_ids, past_key_values, **inputs)

    monkeypatch.setattr(Parrot, "__call__", listening)
    talk = arena.begin(["left-parrot"])
    ask(arena, talk, "one?", system="be brief")
    ask(arena, talk, "two?", system="be brief")
    first = "<|bos|><|system|>be brief<|end|><|user|>one?<|end|>"
    assert seen == [
        f"{first}<|assistant|>",
        f"{first}<|assistant|>yes<|end|><|user|>two?<|end|><|assistant|>",
    ]


def test_the_figures_are_those_of_the_instruments(arena: Arena) -> None:
    talk = arena.begin(["sft", "dpo"])
    ask(arena, talk)
    plain, tuned = [side.figures for side in talk.sides]
    assert plain is not None
    assert tuned is not None
    assert (plain.kl, plain.reference) == (None, None)  # it is not held to anything
    assert tuned.reference == "sft"
    with arena.pool.using("sft") as sft, arena.pool.using("dpo") as dpo, arena.pool.using("reward") as reward:
        from trueup.app.generation import Generation, stream

        again = Generation(dpo.model, dpo.tokenizer, [{"role": "user", "content": "what?"}], SHORT)
        list(stream([again]))
        assert tuned.kl == pytest.approx(float(log_ratios(dpo.model, sft.model, [again.sample])[0].sum()))
        assert reward.scorer is not None
        answer = talk.sides[1].messages[-1]["content"]
        prompt: Any = [{"role": "user", "content": "what?"}]
        [score] = reward.scorer([prompt], [answer], ended=[again.sample.ended])
    assert tuned.rewards == {"reward": pytest.approx(score)}
    assert (tuned.tokens, tuned.finish) == (len(again.ids), again.finish)


def test_the_kl_is_from_the_reference_it_was_held_to(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    with arena.pool.using("sft") as sft:
        monkeypatch.setattr(sft, "identity", "of another training")
    talk = arena.begin(["dpo"])
    ask(arena, talk)
    figures = talk.sides[0].figures
    assert figures is not None
    assert figures.kl is None
    assert "sft was trained anew" in figures.notes[0]


def test_a_side_that_cannot_answer_says_why_and_the_others_go_on(arena: Arena) -> None:
    talk = arena.begin(["damaged", "sft"])
    ask(arena, talk)
    broken, whole = talk.sides
    assert broken.error is not None
    assert "cut short" in broken.error
    assert whole.messages[-1]["role"] == "assistant"
    ask(arena, talk, "again?")
    assert [turn["content"] for turn in broken.messages] == ["again?"]  # what was never answered is replaced


def test_a_base_model_continues_the_last_text(arena: Arena) -> None:
    talk = arena.begin(["base"])
    ask(arena, talk, "once upon a")
    assert talk.sides[0].messages[-1]["role"] == "assistant"


def test_retrying_takes_the_next_seed_and_keeps_the_turns_before(arena: Arena) -> None:
    talk = arena.begin(["sft"])
    ask(arena, talk)
    answers = [talk.sides[0].messages[-1]["content"]]
    for _ in range(2):
        list(talk.retry(arena.pool, SHORT))
        answers.append(talk.sides[0].messages[-1]["content"])
    assert len(set(answers)) == 3
    assert len(talk.sides[0].messages) == 2
    assert talk.settings.seed == SHORT.seed + 2


def test_forgetting_takes_back_the_user_s_turn_and_all_after_it(arena: Arena) -> None:
    talk = arena.begin(["left-parrot"])
    ask(arena, talk, "one?")
    ask(arena, talk, "two?")
    assert talk.forget(-1) == "two?"
    assert talk.forget(0) == "one?"
    assert talk.sides[0].messages == []
    with pytest.raises(UsageError, match="no such message"):
        talk.forget(-1)


def test_nothing_is_taken_back_while_the_answer_grows(arena: Arena) -> None:
    talk = arena.begin(["left-parrot"])
    growing = talk.ask(arena.pool, "one?", SHORT)
    next(growing)
    with pytest.raises(UsageError, match="still being given"):
        talk.forget(-1)
    list(growing)
    assert talk.forget(-1) == "one?"


def test_sides_that_were_asked_different_things_cannot_be_voted_on(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = arena.begin(["left-parrot", "right-parrot"], blind=True)
    monkeypatch.setattr(talk.sides[0], "name", "damaged")
    ask(arena, talk, "one?")
    monkeypatch.undo()
    ask(arena, talk, "two?")
    assert all(side.figures and not side.error for side in talk.sides)
    assert not talk.votable, "one of them answered the first question too"


@pytest.mark.parametrize("closed", [False, True], ids=["stop button", "page closed"])
def test_one_that_is_stopped_keeps_what_was_said_and_frees_the_models(
    closed: bool, runs: Path, tmp_path: Path
) -> None:
    arena = make_arena(
        runs, tmp_path / "votes.sqlite", {"one": Parrot(["a "] * 50, 0.01), "two": Parrot(["b "] * 50)}
    )
    talk = arena.begin(["one", "two"], blind=True)
    steps = talk.ask(arena.pool, "what?", ReplySettings())
    while not all(side.answer for side in talk.sides):
        next(steps)
    with pytest.raises(UsageError, match="still being given"):
        next(talk.ask(arena.pool, "and?", ReplySettings()))
    steps.close() if closed else talk.stop()  # type: ignore[attr-defined]
    list(steps)
    for side in talk.sides:
        assert 0 < len(side.messages[-1]["content"].split()) < 50
        assert side.figures
        assert side.figures.finish == "stopped"
    assert not talk.votable
    assert all(loaded.users == 0 for loaded in arena.pool.loaded.values())
    ask(arena, talk, "again?")
    assert talk.votable


def test_blind_sides_are_drawn_and_shuffled(arena: Arena) -> None:
    drawn = Counter(
        tuple(side.name for side in arena.begin(["sft", "dpo", "base"], blind=True).sides) for _ in range(300)
    )
    assert len(drawn) == 6
    assert min(drawn.values()) > 20


@pytest.mark.parametrize(
    ("choice", "outcome"), [("left", 1.0), ("right", 0.0), ("tie", 0.5), ("both_bad", 0.5)]
)
def test_a_vote_is_stored_with_all_that_it_was_on_and_opens_the_names(
    arena: Arena, choice: str, outcome: float
) -> None:
    talk = arena.begin(["sft", "dpo"], blind=True)
    with pytest.raises(UsageError, match="nothing to vote on"):
        arena.vote(talk.id, choice)
    ask(arena, talk, system="be brief")
    assert talk.hidden
    assert talk.votable
    with pytest.raises(UsageError, match="a vote is one of left, right, tie, both_bad"):
        arena.vote(talk.id, "middle")
    arena.vote(talk.id, choice)
    arena.vote(talk.id, "left")  # a second one changes nothing
    assert not talk.hidden
    [vote] = arena.votes.all()
    left, right = talk.sides
    assert (vote.id, vote.choice, vote.outcome) == (talk.id, choice, outcome)
    assert (vote.left_name, vote.left_identity) == (left.name, left.identity)
    assert vote.right == [{"role": "system", "content": "be brief"}, *right.messages]
    assert vote.settings == SHORT.as_dict()
    with pytest.raises(UsageError, match="there was a vote"):
        ask(arena, talk)


def test_a_vote_that_cannot_be_stored_does_not_open_the_names(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = arena.begin(["sft", "dpo"], blind=True)
    ask(arena, talk)

    def full(vote: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena.votes, "add", full)
    with pytest.raises(OSError, match="No space"):
        arena.vote(talk.id, "left")
    assert talk.hidden
    monkeypatch.undo()
    arena.vote(talk.id, "left")
    assert arena.leaderboard().votes == 1


@pytest.mark.parametrize(
    ("names", "blind", "message"),
    [
        ([], False, "choose a model"),
        (["sft"], True, "at least two"),
        (["sft"] * 5, False, "5 models: up to 4"),
        (["sft", "reward"], False, "'reward' is none of the models"),
        (["../sft"], False, "is none of the models"),
    ],
)
def test_wrong_choices_are_refused(arena: Arena, names: list[str], blind: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arena.begin(names, blind)


def test_empty_messages_and_unknown_conversations_are_refused(arena: Arena) -> None:
    with pytest.raises(UsageError, match="nothing to answer"):
        ask(arena, arena.begin(["sft"]), "  ")
    with pytest.raises(UsageError, match="nothing to answer again"):
        list(arena.begin(["sft"]).retry(arena.pool, SHORT))
    with pytest.raises(UsageError, match="not known any more"):
        arena.find("0" * 32)
