"""`trueup chat`: talk to a model directory in the terminal, or ask it one thing."""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from trueup.app.terminal import printable
from trueup.recipes.directory import open_directory
from trueup.recipes.errors import TrueupError, UsageError

HELP = """\
/system TEXT       say this to the model before the conversation (without TEXT: nothing)
/reset             begin a new conversation
/retry             answer the last message again
/temperature X     0 takes the likeliest token always, 1 samples as the model has learned
/top_p X           sample from the likeliest tokens that make up this share
/max_tokens N      end a reply after so many tokens
/seed N            the next reply's seed; it counts up, so a conversation can be repeated
/save FILE         append the conversation to a file, as a row that SFT can train on
/help, /quit       Ctrl-C stops a reply, Ctrl-D ends too"""


_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 1e-6, 1),
    "max_tokens": (int, 1, 1 << 20),
    "seed": (int, 0, 1 << 62),
}


@dataclass
class Settings:
    """How replies are sampled."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0

    def set(self, name: str, text: str) -> None:
        """Take a value as it was typed. Raises UsageError saying what it may be."""
        kind, lowest, highest = _RANGES[name]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            number = "a whole number" if kind is int else "a number"
            raise UsageError(f"{name} takes {number} from {lowest:g} to {highest:g}, not '{text}'")
        setattr(self, name, value)

    def generation(self, room: int) -> dict[str, Any]:
        """As `generate` takes them; `room` is what the context has left."""
        length = {"max_new_tokens": min(self.max_tokens, room)}
        if self.temperature == 0:
            return length | {"do_sample": False}
        return length | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Reply:
    """What the model said, why it ended, and how long it took."""

    text: str
    finish: str  # stop (the model ended its turn) | length | interrupted
    tokens: int
    seconds: float


@dataclass
class Chat:
    """A model and the conversation so far. `raw`: no chat template, the model continues the text."""

    model: Any
    tokenizer: Any
    settings: Settings
    raw: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str, show: bool = True) -> Reply:
        """Add a message of the user's and stream the reply, which is added too unless it is empty."""
        if self.raw:
            return self._generate(self.tokenizer(text)["input_ids"], show)
        if (
            self.messages and self.messages[-1]["role"] == "user"
        ):  # it was stopped, or did not fit: asked anew
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})
        return self.answer(show)

    def answer(self, show: bool = True) -> Reply:
        """Reply to the conversation as it stands."""
        reply = self._generate(self._prompt(), show)
        if reply.text:
            self.messages.append({"role": "assistant", "content": reply.text})
        return reply

    @property
    def context(self) -> int:
        """Tokens that fit the model, prompt and reply together."""
        return context_length(self.model, self.tokenizer)

    def _prompt(self) -> list[int]:
        """The conversation as tokens, without its oldest exchanges if a reply would not fit any more."""
        ids, self.messages = fit_conversation(
            self.tokenizer, self.messages, self.context, self.settings.max_tokens
        )
        return ids

    def _generate(self, ids: list[int], show: bool) -> Reply:
        import torch

        room = self.context - len(ids)
        if room < 1:
            raise TrueupError(f"that is {len(ids):,} tokens, and the model takes {self.context:,}: say less")
        torch.manual_seed(self.settings.seed)
        self.settings.seed += 1
        stream = _stream(self.tokenizer, show)
        prompt = torch.tensor([ids], device=self.model.device)
        started, finish = time.monotonic(), "stop"
        try:
            with torch.inference_mode():
                self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                    streamer=stream,
                    **self.settings.generation(room),
                )
            if stream.tokens[-1] not in _ends(self.model, self.tokenizer):
                finish = "length"
        except KeyboardInterrupt:
            finish = "interrupted"
            stream.end()
        return Reply(stream.text, finish, len(stream.tokens), round(time.monotonic() - started, 3))


def context_length(model: Any, tokenizer: Any) -> int:
    """Tokens that fit a model, prompt and reply together."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)


def fit_conversation(
    tokenizer: Any, messages: list[dict[str, str]], context: int, max_tokens: int
) -> tuple[list[int], list[dict[str, str]]]:
    """A conversation as tokens up to where the reply begins, and the messages that are left of it.

    The oldest exchanges go, the system prompt stays, until a reply of `max_tokens` fits, or of a quarter of
    the context if that is shorter.
    """
    kept = list(messages)
    first = 1 if kept[0]["role"] == "system" else 0
    while True:
        ids: list[int] = tokenizer.apply_chat_template(kept, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        if len(ids) + min(max_tokens, context // 4) <= context or len(kept) <= first + 2:
            return ids, kept
        del kept[first : first + 2]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a reply."""
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}


def _stream(tokenizer: Any, show: bool) -> Any:
    """Collects a reply and, if wanted, prints it as it comes."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.text = ""
            self.tokens: list[int] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.tokens += value.flatten().tolist()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            if show:
                print(printable(text), end="\n" if stream_end else "", flush=True)

    return Stream()


# ---------------------------------------------------------------- the terminal


def command(chat: Chat, line: str) -> str:
    """Obey a line that begins with a slash; returns what to tell the user.

    Raises:
        UsageError: there is no such command, or its value is wrong.
        EOFError: /quit.
    """
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    match name:
        case "help":
            return HELP
        case "quit" | "exit":
            raise EOFError
        case "reset":
            chat.messages = [m for m in chat.messages if m["role"] == "system"]
            return "a new conversation"
        case "system":
            chat.messages = [{"role": "system", "content": value}] if value else []
            return "a new conversation, " + (
                "with that system prompt" if value else "without a system prompt"
            )
        case "retry":
            return _retry(chat)
        case "save":
            return _save(chat, value)
        case "temperature" | "top_p" | "max_tokens" | "seed":
            if value:
                chat.settings.set(name, value)
            return f"{name} {getattr(chat.settings, name)}"
    raise UsageError(f"there is no /{name}; /help lists what there is")


def _retry(chat: Chat) -> str:
    if chat.messages and chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    if not chat.messages or chat.messages[-1]["role"] != "user":
        raise UsageError("/retry: nothing was asked yet")
    return _ending(chat.answer())


def _save(chat: Chat, name: str) -> str:
    if not name:
        raise UsageError("/save takes a file name")
    if not any(m["role"] == "assistant" for m in chat.messages):
        raise UsageError("/save: there is no conversation yet")
    with Path(name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
    return f"appended to {name}"


def _ending(reply: Reply) -> str:
    return {"stop": "", "length": "[max_tokens reached]", "interrupted": "[stopped]"}[reply.finish]


def converse(chat: Chat) -> None:
    """Read lines and answer them until the end of input."""
    import readline  # noqa: F401 - gives input() editing and history

    while True:
        try:
            line = input("\nyou> " if not chat.raw else "\ntext> ").strip()
            if line:
                note = command(chat, line) if line.startswith("/") else _ending(chat.say(line))
                if note:
                    print(note)
        except KeyboardInterrupt:  # at the prompt: forget the line
            print()
        except EOFError:
            print()
            return
        except (TrueupError, OSError) as error:
            print(error)


def chat(
    directory: Annotated[Path, typer.Argument(help="A model directory.", metavar="DIR")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; text piped in does the same.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the first reply.")] = 0,
    raw: Annotated[
        bool | None, typer.Option(help="Continue text, without chat template; default: for base models.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print the reply as JSON.")] = False,
) -> None:
    """Talk to a model: multi-turn, streaming, with /help for commands. A base model continues text."""
    settings = Settings()
    for name, value in (
        ("temperature", temperature),
        ("top_p", top_p),
        ("max_tokens", max_tokens),
        ("seed", seed),
    ):
        settings.set(name, str(value))
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if as_json and prompt is None:
        raise UsageError("--json goes with --prompt, or with text piped in")
    if prompt == "":
        raise UsageError("--prompt: there is nothing to answer")
    session = open_chat(directory, settings, raw, trust_remote_code)
    if system:
        command(session, f"/system {system}")
    if prompt is None:
        about = "a base model: it continues what you type" if session.raw else "/help lists commands"
        print(f"{directory}: {about}; Ctrl-C stops a reply, Ctrl-D ends")
        return converse(session)
    reply = session.say(prompt, show=not as_json)
    if as_json:
        print(json.dumps({"prompt": prompt, "reply": reply.text, **_figures(reply)}, ensure_ascii=False))
    return None


def _figures(reply: Reply) -> dict[str, Any]:
    return {"finish": reply.finish, "tokens": reply.tokens, "seconds": reply.seconds}


def open_chat(directory: Path, settings: Settings, raw: bool | None, trust_remote_code: bool = False) -> Chat:
    """Load a model to talk to.

    Args:
        raw: None: as the model needs it; base models, and those without a chat template, continue text.

    Raises:
        UsageError: no such directory, not a language model, or it has no chat template and one is asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import trueup.base  # noqa: F401 - registers our model with the Auto classes

    disable_progress_bar()
    opened = open_directory(directory, "causal-lm")
    code = {"trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(opened.path, **code)
    if raw is None:
        raw = tokenizer.chat_template is None or opened.record.get("stage") == "pretrain"
    if not raw and tokenizer.chat_template is None:
        raise UsageError(f"{directory}: has no chat template; --raw continues text instead")
    model = AutoModelForCausalLM.from_pretrained(opened.path, **code)
    return Chat(model.eval(), tokenizer, settings, raw)
