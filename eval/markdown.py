"""Markdown made of facts, and of what models and people wrote: nothing put into a page can change the page.

Templates are Jinja's; every value in them is escaped unless it passes one of these functions:

    environment(folder).get_template("card.md.jinja").render(name="<script>")
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters, and those that reorder what stands around them ("Trojan Source", CVE-2021-42574).
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# $ and \\( begin a formula on the Hub, so a backslash is no escape of itself.
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;"}
# An underscore between letters is a letter, and an interval like [1.2, 3.4] no link.
_SPECIAL = re.compile(r"(?P<interval>\[[-+]?\d[-+.,\d ]*\](?![(\[:]))|[`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# What at the beginning of a line would be a heading, a list or a rule.
_BEGINS_A_BLOCK = re.compile(r"^ ?(?:#+(?= |$)|[+-](?= |$)|(?:--+|=+)(?= *$)|\d+(?=[.)](?: |$)))")
_PLAIN = re.compile(r"[^`|<>&\n]+")


def escape(value: Any) -> Markup:
    """A value as words in a line: no markup, no HTML, no line break."""
    if isinstance(value, Markup):
        return value
    words = re.sub(r"\s+", " ", _UNSEEN.sub(" ", str(value)))
    words = re.sub(r"[&<>\\]", lambda found: _HTML[found[0]], words)
    words = _SPECIAL.sub(lambda found: "\\" * (found["interval"] is None) + found[0], words)
    if begin := _BEGINS_A_BLOCK.match(words):
        cut = begin.end() if begin[0].strip().isdigit() else begin.end() - len(begin[0].strip())
        words = f"{words[:cut]}\\{words[cut:]}"
    return Markup(words)


def code(value: Any) -> Markup:
    """A name as code in a line; as escaped words if it holds what code spans or tables cannot."""
    text = " ".join(_UNSEEN.sub(" ", str(value)).split())
    return Markup(f"`{text}`") if _PLAIN.fullmatch(text) else escape(text)


def block(value: Any, language: str = "") -> Markup:
    """Lines of code, behind a fence that they do not contain."""
    text = _UNSEEN.sub(" ", str(value).replace("\r\n", "\n")).rstrip("\n")
    runs = [len(run) for run in re.findall("`{3,}", text)]
    fence = "`" * (max(runs, default=2) + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def quote(value: Any) -> Markup:
    """What somebody said, as a quotation, line by line."""
    return Markup("\n>\n").join(Markup("> ") + escape(line) for line in str(value).splitlines() or [""])


def environment(folder: Path) -> "Environment":
    """Where templates of Markdown lie; what they print is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,  # macros then return Markup, which is not escaped again
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"code": code, "block": block, "quote": quote}
    return made
