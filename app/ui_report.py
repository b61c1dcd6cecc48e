"""The Report tab: the reports among the runs, embedded: of comparisons, and the ladder of a folder."""

from pathlib import Path

import gradio as gr

from trueup.app.conversation import Arena
from trueup.app.ui_parts import PRIVATE, complaints, empty_html, frame_html
from trueup.eval.report import REPORT
from trueup.recipes.errors import TrueupError, UsageError


def report_tab(page: gr.Blocks, arena: Arena) -> None:
    """Build the tab."""
    names = arena.pool.names("report")
    if not names:
        text = "trueup compare and trueup report write one; name its folder, or one above it, when you start."
        gr.HTML(empty_html("No report among the runs", text))
        return
    chosen = gr.Dropdown(names, value=names[0], label="Report", visible=len(names) > 1)
    frame = gr.HTML(elem_id="report")

    def shown(name: str) -> str:
        with complaints():
            return frame_html(report_page(arena, name), name)

    gr.on([page.load, chosen.change], shown, chosen, frame, **PRIVATE)


def report_page(arena: Arena, name: str) -> str:
    """A comparison's report or a folder's ladder, a page of HTML.

    Raises:
        UsageError: there is no such report.
        TrueupError: its report is missing, or lies outside its folder.
    """
    if name not in arena.pool.names("report"):
        raise UsageError(f"{name!r} is none of the reports: {', '.join(arena.pool.names('report'))}")
    folder = Path(arena.pool.entries[name].place).resolve()
    path = (folder / REPORT).resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        raise TrueupError(f"{name}: has no {REPORT}; run the comparison again")
    return path.read_text(encoding="utf-8")
