"""What the pages of figures share: the template engine, and plots for light and dark.

The palette is Okabe and Ito's, which the colour-blind can tell apart; markers do the same in print.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
THEMES = {"light": ("#1a1a1a", "#999999", "#ffffff"), "dark": ("#e6e6e6", "#777777", "#16181c")}
WIDTH = 9.0  # inches


def render(template: str, filters: Mapping[str, Callable[..., str]] | None = None, **content: Any) -> str:
    """A template of this folder, filled in; what models and users wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # of what models say: a completion may well be HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**content)


def themed(plot: Callable[..., "Figure"], content: Sequence[Any]) -> dict[str, str]:
    """Theme -> the plot as the data URI of an SVG."""
    svgs = {theme: picture(plot, content, theme, "svg") for theme in THEMES}
    return {
        theme: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for theme, svg in svgs.items()
    }


def picture(plot: Callable[..., "Figure"], content: Sequence[Any], theme: str, form: str) -> bytes:
    """A plot in a theme, as `png` or `svg`: the same bytes for the same content."""
    import matplotlib

    ink, faint, paper = THEMES[theme]
    colours = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    papers = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    changed: dict[str, Any] = {
        **dict.fromkeys(colours, ink), **dict.fromkeys(papers, paper),
        "axes.edgecolor": faint, "legend.edgecolor": faint, "grid.color": faint, "grid.alpha": 0.3,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "svg.hashsalt": "trueup", "svg.fonttype": "path",
    }  # fmt: skip
    silent = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}  # no time, no version
    buffer = io.BytesIO()
    with matplotlib.rc_context(changed):
        plot(*content).savefig(buffer, format=form, dpi=150, metadata=silent[form])
    return buffer.getvalue()


@contextmanager
def panels(rows: int, columns: int, height: float) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure of the pages' width, and its panels row by row."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)
