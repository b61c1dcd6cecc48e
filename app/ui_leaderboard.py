"""The Leaderboard tab: what the votes come to, live, and the votes as a preference data set."""

import tempfile
from pathlib import Path

import gradio as gr

from trueup.app.conversation import Arena
from trueup.app.ui_parts import PRIVATE, board_html, complaints, download
from trueup.app.votes import export

LIVE = 5  # seconds between two looks at the votes of others


def leaderboard_tab(page: gr.Blocks, tab: gr.Tab, arena: Arena) -> None:
    """Build the tab."""
    board = gr.HTML(elem_id="board")
    with gr.Row(equal_height=True):
        save = gr.Button("Export as preference data", size="sm", elem_id="export", scale=0, min_width=240)
        gr.Markdown(
            "`preferences.jsonl` is a data set that `trueup dpo` and `trueup reward` read as it is: "
            "`dataset_name: preferences.jsonl`."
        )

    def shown() -> str:
        return board_html(arena.leaderboard())

    def exported() -> str:
        path = Path(tempfile.mkdtemp()) / "preferences.jsonl"
        with complaints():
            gr.Info(export(arena.votes.all(), path), title="Exported", duration=5)
        return str(path)

    gr.on([page.load, tab.select, gr.Timer(LIVE).tick], shown, None, board, **PRIVATE)
    download(save, exported, None)
