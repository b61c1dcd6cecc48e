"""What the tabs share: fragments of HTML with everything escaped, the settings of a reply, complaints."""

import contextlib
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from jinja2 import Environment, FileSystemLoader

from trueup.app.conversation import Side
from trueup.app.generation import ReplySettings
from trueup.app.leaderboard import FEWEST, Leaderboard
from trueup.eval.rendering import Messages
from trueup.recipes.errors import TrueupError

_TEMPLATE = "parts.html.jinja"


@cache
def _parts() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True).get_template(_TEMPLATE).module


def head_html(name: str, identity: str = "") -> str:
    """The name above an answer."""
    return str(_parts().head(name, identity))


def figures_html(side: Side, hidden: bool) -> str:
    """The figures below an answer; hidden: only what the answer itself tells."""
    return str(_parts().figures(side, hidden))


def reveal_html(said: str, left: str, right: str) -> str:
    """The names after a vote."""
    return str(_parts().reveal(said, left, right))


def empty_html(title: str, text: str) -> str:
    """In place of what is not there yet."""
    return str(_parts().empty(title, text))


def board_html(board: Leaderboard) -> str:
    """The leaderboard's tables."""
    if not board.votes:
        return empty_html("No votes yet", "Compare in blind mode, and vote: the ratings appear here.")
    ends = [end for one in board.standings if one.elo for end in (one.elo.low, one.elo.high)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    share = 100 / max(high - low, 1.0)
    return str(_parts().board(board, lambda elo: round((elo - low) * share, 1), FEWEST))


def frame_html(page: str, title: str) -> str:
    """A page in a frame in which no script runs, and which cannot touch the page around it."""
    return str(_parts().frame(page, title))


# ------------------------------------------------------------------------------------------------ controls

# Of the page's own events: other programs have the named endpoints of ui_api.py.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def chatbot(name: str, placeholder: str, editable: str | None = None) -> Any:
    """A conversation, shown as text: markdown could load pictures from anywhere, and hides what was said.

    Its values come from `as_text`: without markdown, too, Gradio takes them for HTML, and cuts tags out.
    """
    return gr.Chatbot(
        show_label=False,
        height=400,
        render_markdown=False,
        buttons=["copy"],
        elem_id=name,
        editable=editable,
        placeholder=placeholder,
        feedback_options=None,
        group_consecutive_messages=False,
    )


def as_text(messages: Messages) -> Messages:
    """Messages as a chatbot shows them letter by letter."""
    return [turn | {"content": escape(str(turn["content"]), quote=False)} for turn in messages]


def prompt_box(name: str, placeholder: str) -> Any:
    """Where the user writes."""
    return gr.Textbox(
        placeholder=placeholder, show_label=False, submit_btn=True, max_lines=8, elem_id=name, autofocus=True
    )


def busy_prompt(**changes: Any) -> Any:
    """The same with a stop button in place of the send button."""
    return gr.Textbox(submit_btn=False, stop_btn=True, **changes)


def idle_prompt(**changes: Any) -> Any:
    """The same ready for the next message."""
    return gr.Textbox(submit_btn=True, stop_btn=False, **changes)


def settings_controls() -> list[Any]:
    """The controls of a reply, closed at first: the system prompt, then what `settings_of` takes."""
    usual = ReplySettings()
    with gr.Accordion("Settings", open=False):
        said = gr.Textbox(label="System prompt", lines=1, max_lines=6)
        with gr.Row():
            rest = [
                gr.Slider(
                    0,
                    2,
                    usual.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0: always the likeliest token",
                ),
                gr.Slider(
                    0.05, 1, usual.top_p, step=0.05, label="Top-p", info="share of probability sampled from"
                ),
                gr.Slider(
                    0, 200, usual.top_k, step=1, label="Top-k", info="likeliest tokens sampled from; 0: all"
                ),
            ]
        with gr.Row():
            rest += [
                gr.Slider(
                    1, 2, usual.repetition_penalty, step=0.05, label="Repetition penalty", info="1: none"
                ),
                gr.Slider(1, 2048, usual.max_new_tokens, step=1, label="Longest answer", info="in tokens"),
                gr.Number(usual.seed, precision=0, minimum=0, label="Seed", info="same seed, same answer"),
            ]
    return [said, *rest]


def settings_of(
    temperature: float, top_p: float, top_k: float, repetition_penalty: float, max_tokens: float, seed: float
) -> ReplySettings:
    """The settings that the controls show. Raises UsageError for what is out of range."""
    return ReplySettings(
        max_new_tokens=int(max_tokens),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        seed=int(seed),
        repetition_penalty=float(repetition_penalty),
    )


@contextlib.contextmanager
def complaints() -> Iterator[None]:
    """What went wrong appears on the page, or is told to the client. Its text may hold what a user wrote."""
    try:
        yield
    except TrueupError as error:
        raise gr.Error(escape(str(error)), title="That did not work", print_exception=False) from error


def download(button: Any, make: Any, inputs: Any, outputs: Any = None) -> None:
    """Let a button make a file and hand it to the browser at once.

    Args:
        make: returns the file's path, and then what goes to `outputs`.
    """
    name = f"file-{button._id}"
    file = gr.DownloadButton("file", visible="hidden", elem_id=name)
    made = button.click(make, inputs, [file, *(outputs or [])], api_visibility="private")
    made.success(
        None, None, None, js=f"() => setTimeout(() => document.getElementById('{name}').click(), 300)"
    )
