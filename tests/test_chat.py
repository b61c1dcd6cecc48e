"""The terminal chat: what it sends the model, what it shows, what its commands do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_models import write_base
from typer import Typer
from typer.testing import CliRunner

from trueup.app import chat as chat_module
from trueup.app.chat import Chat, Settings, chat, command, converse, open_chat
from trueup.recipes.directory import write_json
from trueup.recipes.errors import TrueupError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(model: Path) -> Chat:
    return open_chat(model, Settings(max_tokens=8), raw=None)


class Scripted:
    """In place of a model: says what it is told to, token by token, or is interrupted."""

    def __init__(self, session: Chat, *replies: str, interrupt_after: int | None = None):
        self.session, self.replies, self.interrupt_after = session, list(replies), interrupt_after
        self.prompts: list[str] = []
        self.config, self.device = session.model.config, torch.device("cpu")
        self.generation_config = session.model.generation_config

    def generate(self, prompt: torch.Tensor, streamer: Any, **kwargs: Any) -> None:
        tokenizer = self.session.tokenizer
        self.prompts.append(tokenizer.decode(prompt[0]))
        self.kwargs = kwargs
        streamer.put(prompt)
        ids = tokenizer(self.replies.pop(0), add_special_tokens=False)["input_ids"]
        for number, token in enumerate([*ids, tokenizer.eos_token_id]):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            streamer.put(torch.tensor([token]))
        streamer.end()


def script(session: Chat, *replies: str, **options: Any) -> Scripted:
    session.model = Scripted(session, *replies, **options)
    return session.model


def invoke(*words: Any, text: str | None = None) -> Any:
    app = Typer()
    app.command()(chat)
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


# ---------------------------------------------------------------- conversations


def test_every_turn_is_sent_with_all_before_it(session: Chat) -> None:
    model = script(session, "it is 4", "it is 9")
    command(session, "/system be brief")
    session.say("what is 2?")
    session.say("what is 3?")
    first = "<|bos|><|system|>be brief<|end|><|user|>what is 2?<|end|>"
    assert model.prompts == [
        f"{first}<|assistant|>",
        f"{first}<|assistant|>it is 4<|end|><|user|>what is 3?<|end|><|assistant|>",
    ]


def test_a_reply_streams_without_special_tokens_and_says_why_it_ended(
    session: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    script(session, "it is 4 indeed")
    reply = session.say("what?")
    assert capsys.readouterr().out == "it is 4 indeed\n"
    assert (reply.text, reply.finish) == ("it is 4 indeed", "stop")


def test_escape_sequences_of_the_model_are_not_obeyed(
    session: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    script(session, "\x1b[2Jgone\x07")
    reply = session.say("what?")
    assert capsys.readouterr().out == "\\x1b[2Jgone\\x07\n"
    assert reply.text == "\x1b[2Jgone\x07"  # the model is told what it said


def test_ctrl_c_stops_the_reply_and_not_the_program(session: Chat) -> None:
    model = script(session, "it is 4 indeed indeed", interrupt_after=6)
    reply = session.say("what?")
    assert reply.finish == "interrupted"
    assert "it is 4 indeed indeed".startswith(reply.text)
    assert reply.text
    assert session.messages[-1] == {"role": "assistant", "content": reply.text}
    model.replies, model.interrupt_after = ["nothing"], 0
    assert session.say("again?").text == ""
    model.replies, model.interrupt_after = ["it is"], None
    session.say("well?")  # the question without an answer is replaced
    assert [m["role"] for m in session.messages] == ["user", "assistant", "user", "assistant"]


def test_the_oldest_exchange_is_forgotten_when_the_context_is_full(session: Chat) -> None:
    model = script(session, *["it is " + "1 " * 9] * 4)
    command(session, "/system be brief")
    for _ in range(4):
        session.say("what is it?")
    assert all("be brief" in prompt for prompt in model.prompts)
    lengths = [len(session.tokenizer(p, add_special_tokens=False)["input_ids"]) for p in model.prompts]
    assert max(lengths) + 8 <= session.context == 64
    assert session.messages[0]["role"] == "system"


def test_a_message_longer_than_the_context_is_refused(session: Chat) -> None:
    with pytest.raises(TrueupError, match="tokens, and the model takes 64: say less"):
        session.say("what is " * 60)


def test_the_real_model_repeats_itself_with_the_seed_and_only_then(model: Path) -> None:
    first, again, other = (
        open_chat(model, Settings(seed=seed, temperature=1.0, max_tokens=12), None).say("what?", show=False)
        for seed in (3, 3, 4)
    )
    assert first.text == again.text != other.text
    assert first.finish == "length"
    assert first.tokens == 12


def test_temperature_0_is_greedy(session: Chat) -> None:
    model = script(session, "it", "it")
    session.settings.temperature = 0
    session.say("what?")
    assert model.kwargs["do_sample"] is False
    command(session, "/temperature 0.5")
    session.say("what?")
    assert (model.kwargs["do_sample"], model.kwargs["temperature"]) == (True, 0.5)


# ---------------------------------------------------------------- commands


def test_commands(session: Chat, tmp_path: Path) -> None:
    script(session, "one", "two")
    session.say("what?")
    assert command(session, "/retry") == ""
    assert [m["content"] for m in session.messages] == ["what?", "two"]
    assert command(session, "/max_tokens 5") == "max_tokens 5"
    assert command(session, "/seed") == f"seed {session.settings.seed}"
    command(session, f"/save {tmp_path / 'talk.jsonl'}")
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"] == session.messages
    command(session, "/reset")
    assert session.messages == []
    assert "/retry" in command(session, "/help")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "there is no /temprature; /help"),
        ("/temperature hot", "temperature takes a number from 0 to 100, not 'hot'"),
        ("/top_p 1.5", "top_p takes a number from 1e-06 to 1"),
        ("/max_tokens 2.5", "max_tokens takes a whole number"),
        ("/retry", "nothing was asked yet"),
        ("/save", "takes a file name"),
        ("/save talk.jsonl", "no conversation yet"),
    ],
)
def test_wrong_commands_say_what_is_right(session: Chat, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command(session, line)


def test_the_loop_survives_mistakes_and_ends_with_the_input(
    session: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(session, "it is 4")
    lines: list[Any] = ["/nonsense", "", KeyboardInterrupt(), "what?", EOFError()]

    def typed(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    converse(session)
    out = capsys.readouterr().out
    assert "there is no /nonsense" in out
    assert "it is 4" in out


# ---------------------------------------------------------------- the command line


def test_one_shot_prints_the_reply_alone_or_as_json(model: Path) -> None:
    words = [model, "--max-tokens", "6", "--temperature", "0"]
    plain = invoke(*words, "--prompt", "what is 2?")
    piped = invoke(*words, text="what is 2?\n")
    asked = invoke(*words, "--prompt", "what is 2?", "--json")
    assert plain.exit_code == piped.exit_code == asked.exit_code == 0, asked.exception
    found = json.loads(asked.stdout)
    assert found["prompt"] == "what is 2?"
    assert found["tokens"] == 6
    assert found["finish"] == "length"
    assert plain.stdout == piped.stdout
    assert chat_module.printable(found["reply"]) == plain.stdout[:-1]


def test_a_base_model_continues_text(model: Path, tmp_path: Path) -> None:
    from trueup.recipes.directory import identity

    base = write_base(tmp_path / "base")
    write_json(base / "trueup.json", {"stage": "pretrain", "identity": identity(base)})
    session = open_chat(base, Settings(max_tokens=4), raw=None)
    scripted = script(session, "4")
    session.say("2 times 2 is")
    assert session.raw
    assert scripted.prompts == ["<|bos|>2 times 2 is"]
    assert not open_chat(model, Settings(), raw=None).raw


def test_wrong_words_are_refused(model: Path, tmp_path: Path) -> None:
    for words, text, message in (
        ([tmp_path / "nowhere", "--prompt", "x"], None, "no such model directory"),
        ([model, "--prompt", "x", "--top-p", "2"], None, "top_p takes a number"),
        ([model], " \n", "there is nothing to answer"),
    ):
        result = invoke(*words, text=text)
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)
