"""The named endpoints of the app: all that the page can do, for `gradio_client` and other programs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from trueup.app.conversation import Arena, Conversation
from trueup.app.ui_parts import complaints, settings_of
from trueup.app.ui_report import report_page
from trueup.app.votes import preference_rows

Json = dict[str, Any]


def add_endpoints(arena: Arena, queued: Json) -> None:
    """Add them to the page that is being built.

    Args:
        queued: how what generates is queued.
    """
    api = _Api(arena)
    gr.api(api.compare, api_name="compare", **queued)
    gr.api(api.regenerate, api_name="regenerate", **queued)
    for endpoint in (api.models, api.vote, api.leaderboard, api.preferences, api.report):
        gr.api(endpoint, api_name=endpoint.__name__)


class _Api:
    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def models(self) -> list[Json]:
        """What the app was given: name and kind (chat, reward, report)."""
        return [{"name": one.name, "kind": one.kind} for one in self.arena.pool.entries.values()]

    def compare(
        self,
        prompt: str,
        models: list[str],
        conversation: str = "",
        blind: bool = False,
        system: str = "",
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: float = 0,
        repetition_penalty: float = 1.0,
        max_tokens: float = 256,
        seed: float = 0,
    ) -> Iterator[Json]:
        """Ask one model or several; streams the state of the conversation, which `conversation` continues."""
        with complaints():
            found = self.arena.find(conversation) if conversation else self.arena.begin(models, blind)
            settings = settings_of(temperature, top_p, top_k, repetition_penalty, max_tokens, seed)
            for _ in found.ask(self.arena.pool, prompt, settings, system):
                yield _state(found)

    def regenerate(self, conversation: str) -> Iterator[Json]:
        """Answer the last message of a conversation again, with the next seed."""
        with complaints():
            found = self.arena.find(conversation)
            for _ in found.retry(self.arena.pool, found.settings):
                yield _state(found)

    def vote(self, conversation: str, choice: str) -> Json:
        """Vote left, right, tie or both_bad; the reply tells the names, and that the vote is on the disk."""
        with complaints():
            return _state(self.arena.vote(conversation, choice))

    def leaderboard(self) -> Json:
        """Standings and pairs."""
        return self.arena.leaderboard().as_dict()

    def preferences(self) -> list[Json]:
        """The votes as rows prompt, chosen, rejected."""
        return list(preference_rows(self.arena.votes.all()))

    def report(self, name: str) -> str:
        """A comparison's report, a page of HTML."""
        with complaints():
            return report_page(self.arena, name)


def _state(conversation: Conversation) -> Json:
    """A conversation as a client sees it: without names and figures while it is blind."""
    hidden = conversation.hidden
    return {
        "conversation": conversation.id,
        "votable": conversation.votable,
        "choice": conversation.choice,
        "answers": [
            {
                "model": None if hidden else side.name,
                "identity": None if hidden else side.identity,
                "text": _answer(side.shown()),
                "figures": asdict(side.figures) if side.figures and not hidden else None,
                "error": side.error,
            }
            for side in conversation.sides
        ],
    }


def _answer(messages: list[Json]) -> str:
    last = messages[-1] if messages else {"role": ""}
    return str(last["content"]) if last["role"] == "assistant" else ""
