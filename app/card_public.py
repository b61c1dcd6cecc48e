"""What of a record may be shown to the world: no path of this machine, no token."""

import re
from pathlib import Path
from typing import Any

from trueup.recipes.reader import SECRET_KEYS

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(r"(^|_)(api_key|password|secret|access_token|auth_token)$")
_SECRET = re.compile(r"\b(?:hf|sk|ghp|github_pat)[_-][A-Za-z0-9_-]{16,}")
# Two names deep at least (a token like </s> is no path); not within a URL, a Hub id or a relative path.
_ABSOLUTE = re.compile(r"(?<![\w:/.~<-])(?:/[^\s/\"'`<>|:;,()\[\]{}]+){2,}/?")


def public(value: Any, folder: Path) -> Any:
    """JSON with absolute paths made relative to the folder of the runs, or cut to their last name, and
    without secrets.

    Args:
        folder: where the runs lie, absolute.
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN if one and _is_secret(str(key)) else public(one, folder) for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [public(one, folder) for one in value]
    return _public_text(value, folder) if isinstance(value, str) else value


def _is_secret(key: str) -> bool:
    return key in SECRET_KEYS or bool(_SECRET_KEY.search(key))


def _public_text(text: str, folder: Path) -> str:
    if text.startswith("/") and "\n" not in text and (path := Path(text)).name:
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
    for root, shown in ((folder, ""), (Path.home(), "~/")):
        if root.name:  # not the root of the disk
            text = text.replace(f"{root}/", shown)
    return _SECRET.sub(HIDDEN, _ABSOLUTE.sub(lambda found: Path(found[0]).name, text))
