"""Hub ids where a model directory may stand: `org/name`, or `org/name@revision`. One resolver for all."""

import json
import re
from pathlib import Path
from typing import Any

from trueup.recipes.errors import UsageError

# Of a Hub repository what a model directory is made of: no other format of the same weights. Its code comes
# along, and is run only where the user trusts it.
_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Where the Hub's client keeps a snapshot; no id has two hyphens in a row.
_SNAPSHOT = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})")


def is_hub_id(name: Path | str) -> bool:
    """Whether a name means the Hub: it looks like an id, and neither it nor its first part is a folder here.

    What is missing in a folder that exists is a directory, and whoever opens it says so.
    """
    return HUB_ID.fullmatch(str(name)) is not None and not Path(name).parent.is_dir()


def names_model(name: Path | str) -> bool:
    """Whether a name is a directory's or a Hub id, rather than a function's or a registered one."""
    return Path(name).is_dir() or is_hub_id(name)


def local_directory(name: Path | str, place: str = "") -> str:
    """A model directory as it is, or the snapshot of a Hub id.

    A snapshot lies in the Hub's own cache under the hash of its commit; with HF_HUB_OFFLINE=1, or without a
    network, it must be there already.

    Args:
        place: where the name was written, for messages.

    Raises:
        UsageError: there is neither such a directory nor such a repository.
    """
    hub = HUB_ID.fullmatch(str(name))
    if hub is None or not is_hub_id(name):
        return str(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(hub["id"], revision=hub["revision"], allow_patterns=_FILES)
    except (HfHubHTTPError, OSError, ValueError) as error:  # refused; not reached; not cached, offline
        at, reason = f"{place}: " if place else "", str(error).strip().splitlines()[0]
        raise UsageError(
            f"{at}{name}: no such model directory (run the stage that writes it first), nor can it be had "
            f"from the Hub: {reason}"
        ) from error


def config_of(name: str) -> dict[str, Any] | None:
    """The configuration of a Hub id; None if it cannot be had."""
    hub = HUB_ID.fullmatch(name)
    if hub is None:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = hf_hub_download(hub["id"], "config.json", revision=hub["revision"])
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (HfHubHTTPError, OSError, ValueError):
        return None
    return found


def file_beside(name: str, file: str) -> Path | None:
    """A file of a directory that a record names, if it is still there; of a Hub id, if it was downloaded."""
    hub = HUB_ID.fullmatch(name)
    if hub is None or not is_hub_id(name):
        path = Path(name) / file
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub["id"], file, revision=hub["revision"])
    return Path(found) if isinstance(found, str) else None


def public_name(path: Path) -> str:
    """How a directory is called in records: a snapshot by its id and commit, any other by its path."""
    found = _SNAPSHOT.search(path.as_posix())
    return f"{found['org']}/{found['name']}@{found['commit']}" if found else str(path)


def short_name(name: Path | str) -> str:
    """The last part of a directory's name or a Hub id, without the revision."""
    return Path(str(name).partition("@")[0] if is_hub_id(name) else name).name


def results_folder(name: Path | str) -> Path:
    """Where what is measured of a model is written: its own directory; for one of the Hub below runs/."""
    return Path("runs") / str(name).replace("/", "--") if is_hub_id(name) else Path(name)
