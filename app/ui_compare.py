"""The Compare tab: up to four models answer side by side, or two that nobody knows, and a vote."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from trueup.app.conversation import MOST, Arena, Conversation, Side
from trueup.app.ui_parts import (
    PRIVATE,
    as_text,
    busy_prompt,
    chatbot,
    complaints,
    empty_html,
    figures_html,
    head_html,
    idle_prompt,
    prompt_box,
    reveal_html,
    settings_controls,
    settings_of,
)

BUTTONS = {  # choice -> what its button says; page.js presses them by key
    "left": "← Left is better",
    "tie": "Tie (T)",
    "both_bad": "Both bad (B)",
    "right": "Right is better →",
}
SAID = {
    "left": "You preferred the left answer.",
    "right": "You preferred the right answer.",
    "tie": "You called it a tie.",
    "both_bad": "You found both bad.",
}


def compare_tab(arena: Arena, examples: Sequence[str], queued: dict[str, Any]) -> None:
    """Build the tab.

    Args:
        queued: how what generates is queued.
    """
    names = arena.pool.names("chat")
    if len(names) < 2:
        text = "Name at least two when you start it: trueup app runs/lab/sft runs/lab/dpo"
        gr.HTML(empty_html("A comparison takes two models", text))
        return
    known = gr.State("")  # the conversation's id
    with gr.Row(equal_height=True, elem_id="compare-choice"):
        chosen = gr.Dropdown(
            names, value=names[-2:], multiselect=True, label="Models", scale=3, elem_id="compare-models"
        )
        blind = gr.Checkbox(
            label="Blind",
            info="two of them, unnamed until you vote",
            scale=1,
            min_width=240,
            elem_id="compare-blind",
        )
    with gr.Row(elem_id="panes"):
        panes = [part for place in range(MOST) for part in _pane(place, names[-2:])]
    verdict = gr.HTML(visible=False, elem_id="verdict")
    with gr.Row(visible=False, elem_id="votes") as votes:
        buttons = {
            choice: gr.Button(text, elem_id=f"vote-{choice}", min_width=120)
            for choice, text in BUTTONS.items()
        }
    prompt = prompt_box("compare-prompt", "Ask all of them (Enter sends)")
    with gr.Row():
        again = gr.Button("Regenerate", size="sm", elem_id="compare-again", min_width=120)
        fresh = gr.Button("New comparison", size="sm", elem_id="compare-new", min_width=120)
    gr.Examples([[text] for text in examples], [prompt], label="For example")
    controls = settings_controls()

    view = _View(arena)
    shown = [known, prompt, votes, verdict, *panes]
    asked = prompt.submit(view.ask, [known, prompt, chosen, blind, *controls], shown, **PRIVATE, **queued)
    retried = again.click(view.retry, [known, *controls], shown, **PRIVATE, **queued)
    for event in (asked, retried):  # the keys vote as soon as the cursor has left the prompt
        event.then(None, blind, None, js="(blind) => { if (blind) document.activeElement.blur(); }")
    prompt.stop(view.stop, known, None, **PRIVATE)
    for choice, button in buttons.items():
        button.click(partial(view.vote, choice=choice), known, shown, **PRIVATE)
    fresh.click(view.new, [chosen, blind], shown, cancels=[asked, retried], **PRIVATE)
    gr.on([chosen.change, blind.change], view.new, [chosen, blind], shown, **PRIVATE)


def _pane(place: int, names: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Column, head, conversation, figures; the first ones stand open under these names."""
    with gr.Column(min_width=300, visible=place < len(names), elem_classes="pane") as column:
        head = gr.HTML(head_html(names[place]) if place < len(names) else "")
        return column, head, chatbot(f"pane-{place}", "The answer appears here."), gr.HTML()


class _View:
    """What the page shows of a conversation: values for all its outputs, in their order."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def ask(
        self, id: str, text: str, chosen: list[str], blind: bool, system: str, *settings: float
    ) -> Iterator[list[Any]]:
        with complaints():
            conversation = self.arena.find(id) if id else None
            # After a vote the next prompt meets the next pair; and other models may be chosen by now.
            if not conversation or conversation.choice or not conversation.suits(chosen, blind):
                conversation = self.arena.begin(chosen, blind)
            prompt = busy_prompt(value="")
            for _ in conversation.ask(self.arena.pool, text, settings_of(*settings), system):
                yield self._render(conversation, prompt)
                prompt = busy_prompt()
        yield self._render(conversation)

    def retry(self, id: str, system: str, *settings: float) -> Iterator[list[Any]]:
        with complaints():
            conversation = self.arena.find(id)
            for _ in conversation.retry(self.arena.pool, settings_of(*settings)):
                yield self._render(conversation, busy_prompt())
        yield self._render(conversation)

    def stop(self, id: str) -> None:
        with complaints():
            self.arena.find(id).stop()

    def vote(self, id: str, choice: str) -> list[Any]:
        with complaints():
            return self._render(self.arena.vote(id, choice))

    def new(self, chosen: list[str], blind: bool) -> list[Any]:
        sides = [Side("Left"), Side("Right")] if blind else [Side(name) for name in chosen[:MOST]]
        panes = self._panes(sides, hidden=blind)
        return ["", idle_prompt(), gr.Row(visible=False), gr.HTML(visible=False), *panes]

    def _render(self, conversation: Conversation, prompt: Any = None) -> list[Any]:
        reveal = ""
        if conversation.blind and conversation.choice:
            left, right = conversation.sides
            reveal = reveal_html(SAID[conversation.choice], left.name, right.name)
        return [
            conversation.id,
            prompt or idle_prompt(),
            gr.Row(visible=conversation.votable and not prompt),
            gr.HTML(reveal, visible=bool(reveal)),
            *self._panes(conversation.sides, conversation.hidden),
        ]

    def _panes(self, sides: Sequence[Side], hidden: bool) -> list[Any]:
        found: list[Any] = []
        for place in range(MOST):
            if place >= len(sides):
                found += [gr.Column(visible=False), "", [], ""]
                continue
            side = sides[place]
            head = head_html(("Left", "Right")[place]) if hidden else head_html(side.name, side.identity)
            found += [gr.Column(visible=True), head, as_text(side.shown()), figures_html(side, hidden)]
        return found
