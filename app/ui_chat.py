"""The Chat tab: one model, with everything that can be set."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import gradio as gr

from trueup.app.conversation import Arena, Conversation
from trueup.app.ui_parts import (
    PRIVATE,
    as_text,
    busy_prompt,
    chatbot,
    complaints,
    download,
    figures_html,
    idle_prompt,
    prompt_box,
    settings_controls,
    settings_of,
)
from trueup.recipes.errors import UsageError


def chat_tab(arena: Arena, examples: Sequence[str], queued: dict[str, Any]) -> None:
    """Build the tab.

    Args:
        queued: how what generates is queued.
    """
    names = arena.pool.names("chat")
    known = gr.State("")  # the conversation's id
    model = gr.Dropdown(names, value=names[-1], label="Model", elem_id="chat-model")
    said = chatbot(
        "chat", "Ask something. Messages can be edited, answers regenerated or undone.", editable="user"
    )
    figures = gr.HTML(elem_id="chat-figures")
    prompt = prompt_box("chat-prompt", "Say something (Enter sends)")
    with gr.Row():
        fresh = gr.Button("New conversation", size="sm", elem_id="chat-new", min_width=120)
        save = gr.Button("Download", size="sm", elem_id="chat-download", min_width=120)
    gr.Examples([[text] for text in examples], [prompt], label="For example")
    controls = settings_controls()

    view = _View(arena)
    shown = [known, prompt, said, figures]
    asked = prompt.submit(view.ask, [known, prompt, model, *controls], shown, **PRIVATE, **queued)
    retried = said.retry(view.retry, [known, model, *controls], shown, **PRIVATE, **queued)
    edited = said.edit(view.edit, [known, model, *controls], shown, **PRIVATE, **queued)
    running = [asked, retried, edited]
    said.undo(view.undo, known, shown, **PRIVATE)
    prompt.stop(view.stop, known, None, **PRIVATE)
    gr.on([fresh.click, said.clear], view.new, None, shown, cancels=running, **PRIVATE)
    download(save, view.save, known)


class _View:
    """What the page shows of a conversation: id, prompt, messages, figures."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def ask(self, id: str, text: str, model: str, system: str, *settings: float) -> Iterator[list[Any]]:
        with complaints():
            conversation = self.arena.find(id) if id else self.arena.begin([model])
            conversation.sides[0].name = model  # it may be another from here on
            prompt = busy_prompt(value="")
            for _ in conversation.ask(self.arena.pool, text, settings_of(*settings), system):
                yield self._render(conversation, prompt)
                prompt = busy_prompt()
        yield self._render(conversation)

    def retry(self, id: str, model: str, system: str, *settings: float) -> Iterator[list[Any]]:
        with complaints():
            conversation = self.arena.find(id)
            conversation.sides[0].name = model
            for _ in conversation.retry(self.arena.pool, settings_of(*settings)):
                yield self._render(conversation, busy_prompt())
        yield self._render(conversation)

    def edit(
        self, event: gr.EditData, id: str, model: str, system: str, *settings: float
    ) -> Iterator[list[Any]]:
        with complaints():
            self.arena.find(id).forget(_place(event.index))
            yield from self.ask(id, unescape(str(event.value)), model, system, *settings)

    def undo(self, id: str) -> list[Any]:
        with complaints():
            conversation = self.arena.find(id)
            text = conversation.forget(-1)
        return self._render(conversation, idle_prompt(value=text))

    def stop(self, id: str) -> None:
        with complaints():
            self.arena.find(id).stop()

    def new(self) -> list[Any]:
        return ["", idle_prompt(), [], ""]

    def save(self, id: str) -> str:
        """The conversation as a row that SFT can train on."""
        with complaints():
            if not id:
                raise UsageError("there is no conversation yet")
            conversation = self.arena.find(id)
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        path = Path(tempfile.mkdtemp()) / "conversation.jsonl"
        row = {"messages": [*system, *conversation.sides[0].messages]}
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        return str(path)

    def _render(self, conversation: Conversation, prompt: Any = None) -> list[Any]:
        [side] = conversation.sides
        return [
            conversation.id,
            prompt or idle_prompt(),
            as_text(side.shown()),
            figures_html(side, hidden=False),
        ]


def _place(index: Any) -> int:
    """Of a message; with the place of its part where it has several."""
    return int(index[0] if isinstance(index, list | tuple) else index)
