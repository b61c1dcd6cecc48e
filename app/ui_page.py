"""The page: four tabs on one set of models, and the named endpoints."""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from trueup.app.conversation import Arena
from trueup.app.ui_api import add_endpoints
from trueup.app.ui_chat import chat_tab
from trueup.app.ui_compare import compare_tab
from trueup.app.ui_leaderboard import leaderboard_tab
from trueup.app.ui_report import report_tab
from trueup.eval.report import PROMPTS

HERE = Path(__file__).parent
AT_ONCE = 4  # answers that are generated at a time; the others wait
WAITING = 64  # requests that may wait; who comes then is told to try later
EXAMPLES = (
    "Explain in two sentences why the sky is blue.",
    "Write a four-line poem about a lighthouse.",
    "What is 17 plus 26?",
    "Name three fruits that are red.",
)


def build_page(arena: Arena) -> gr.Blocks:
    """The whole app, not yet served."""
    examples = example_prompts(arena)
    queued: dict[str, Any] = {"concurrency_id": "generation", "concurrency_limit": AT_ONCE}
    with gr.Blocks(title="trueup", analytics_enabled=False) as page:
        gr.HTML('<h1 class="title">trueup</h1>')
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare_tab(arena, examples, queued)
            with gr.Tab("Leaderboard", id="leaderboard") as leaderboard:
                leaderboard_tab(page, leaderboard, arena)
            with gr.Tab("Chat", id="chat"):
                chat_tab(arena, examples, queued)
            with gr.Tab("Report", id="report"):
                report_tab(page, arena)
        add_endpoints(arena, queued)
    return page.queue(max_size=WAITING)


def serve_page(page: gr.Blocks, host: str, port: int | None, **options: Any) -> Any:
    """Start serving, and return at once.

    Args:
        port: None: the first free one from 7860.
        options: of `gradio.Blocks.launch`.
    """
    system_fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono_fonts = ("ui-monospace", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=system_fonts, font_mono=mono_fonts)
    return page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        theme=theme,
        css_paths=HERE / "page.css",
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api", "settings"],
        allowed_paths=[],
        max_file_size="1kb",  # nothing here takes files
        run_history=False,  # what was asked is not kept in the browser
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        **options,
    )


def example_prompts(arena: Arena) -> list[str]:
    """Something to ask: of the prompts the runs were compared on, one of each family; else a few of ours."""
    for name in arena.pool.names("report"):
        path = Path(arena.pool.entries[name].place) / PROMPTS
        if path.exists():
            families: dict[Any, str] = {}
            with path.open(encoding="utf-8") as file:
                for row in map(json.loads, file):
                    prompt = row["prompt"]
                    if isinstance(prompt, list):
                        prompt = prompt[-1]["content"] if len(prompt) == 1 else ""
                    if 0 < len(prompt) <= 80:
                        families.setdefault(row.get("family", prompt), prompt)
            if families:
                return list(families.values())[:6]
    return list(EXAMPLES)
