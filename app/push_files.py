"""What of a directory goes to the Hub: an allow-list, and nothing that tells of this machine.

The files are gathered in a folder of their own. What is verified there is what goes up.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from trueup.app.card import card
from trueup.eval.frontier import FRONTIER
from trueup.recipes.directory import RECORD, is_comparison, is_data_set, open_directory, read_json
from trueup.recipes.errors import TrueupError, UsageError

CARD = "README.md"
# A model's files besides its code. Of an earlier push, those that are gone are removed by the same list.
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "calibration.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "adapter/adapter_config.json", "adapter/*.safetensors", RECORD, "eval/*.json", FRONTIER,
)  # fmt: skip
DATA_FILES = ("*.jsonl", "card.json", RECORD)
_WRITTEN_HERE = (RECORD, "card.json", "eval/*.json", "adapter/adapter_config.json")  # may name paths
_SAVED_FROM = ("config.json", "tokenizer_config.json")  # may name the path they were loaded from
_PATH_KEYS = ("_name_or_path", "name_or_path")
# Two names at least: a lone "/word" is more likely text. Not the rest of a URL, nor of a relative path.
_PATH = re.compile(r"(?<![\w.~:/<\\-])/[^\s\"'`:,;()\[\]{}|<>/]+(?:/[^\s\"'`:,;()\[\]{}|<>/]+)+")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


@dataclass(frozen=True)
class Parcel:
    """The files of one push.

    Args:
        source: what was named.
        folder: holds exactly what goes up, large files as links.
        kind: of the Hub's repository.
        left: files of the source that stay here.
        about: what it is, for the commit's message.
    """

    source: Path
    folder: Path
    kind: Literal["model", "dataset"]
    left: tuple[str, ...]
    about: str

    @property
    def files(self) -> dict[str, Path]:
        """Path in the repository -> file, in their order."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.resolve() for path in found}

    def head(self) -> str:
        """The card's YAML head."""
        text = (self.folder / CARD).read_text(encoding="utf-8")
        found = re.match(r"---\n.*?\n---", text, re.DOTALL)
        return found[0] if found else text.splitlines()[0]

    def replaces(self, path: str) -> bool:
        """Whether a file of the repository is an earlier push's, whose absence here means something."""
        if self.source.is_file():  # one file among others: it replaces nothing
            return False
        return _allowed(path, MODEL_FILES if self.kind == "model" else DATA_FILES)


@contextlib.contextmanager
def gathered(source: Path, repo_id: str) -> Iterator[Parcel]:
    """The parcel of a model directory, a directory of data, or a file of rows; its folder is then removed.

    Raises:
        UsageError: it is none of these.
        TrueupError: it is damaged, or was changed after it was written.
    """
    with tempfile.TemporaryDirectory(prefix="trueup-push-") as name:
        folder = Path(name) / repo_id.rpartition("/")[2]  # remote code is cached by this name
        folder.mkdir()
        if source.is_file():
            if source.suffix != ".jsonl":
                raise UsageError(f"{source}: rows are pushed as .jsonl, one JSON object a line")
            (folder / source.name).symlink_to(source.resolve())
            parcel = Parcel(source, folder, "dataset", (), source.name)
            _add_card(folder, folder, repo_id)
        else:
            parcel = _directory(source, folder)
            _add_card(source, folder, repo_id)
            left = tuple(
                name for name in parcel.left if not (folder / name).exists()
            )  # the card's pictures go
            parcel = replace(parcel, left=left)
        yield parcel


def _directory(source: Path, folder: Path) -> Parcel:
    if not source.is_dir():
        raise UsageError(f"{source}: no such directory, nor a file of rows (.jsonl)")
    if is_comparison(source):
        raise UsageError(f"{source}: is a comparison; push the model it speaks of, whose card shows it")
    if (source / "adapter_config.json").exists() and not (source / "config.json").exists():
        raise UsageError(f"{source}: is a bare adapter; `trueup merge {source} --to DIR` makes it a model")
    opened = open_directory(source)
    data = is_data_set(source)
    allowed = DATA_FILES if data else (*MODEL_FILES, *_code(source))
    left = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        if _allowed(name, allowed):
            _add(path, folder / name, name)
        elif name != CARD:
            left.append(name)
    about = f"{opened.record.get('stage', 'data' if data else 'model')} {opened.identity[:12]}"
    return Parcel(source, folder, "dataset" if data else "model", tuple(left), about)


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    """By folder and name: the * of a pattern stays within its folder."""
    return any(
        name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns
    ) and not name.startswith(".")


def _code(source: Path) -> tuple[str, ...]:
    """The Python files that the configuration's auto_map names, and those they import from beside them."""
    wanted = [
        f"{target.partition('.')[0]}.py"
        for target in read_json(source / "config.json").get("auto_map", {}).values()
        if isinstance(target, str)
    ]
    found: list[str] = []
    while wanted:
        name = wanted.pop()
        if name not in found and (source / name).is_file():
            found.append(name)
            text = (source / name).read_text(encoding="utf-8")
            wanted += [f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)]
    return tuple(found)


def _add(path: Path, target: Path, name: str) -> None:
    target.parent.mkdir(exist_ok=True)
    if _allowed(name, _WRITTEN_HERE):
        target.write_text(json.dumps(_public(read_json(path)), indent=2, ensure_ascii=False) + "\n", "utf-8")
    elif name in _SAVED_FROM and any(key in (content := read_json(path)) for key in _PATH_KEYS):
        kept = {key: value for key, value in content.items() if key not in _PATH_KEYS}
        target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
    else:
        target.symlink_to(path.resolve())


def _add_card(source: Path, folder: Path, repo_id: str) -> None:
    made = card(source, repo_id)
    (folder / CARD).write_text(without_paths(made.text), encoding="utf-8")
    for name, content in made.files.items():
        target = folder / name
        if target.exists():
            raise TrueupError(f"{name}: the card brings a file of the model's own name")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


# ---------------------------------------------------------------- nothing of this machine


def _public(content: Any) -> Any:
    """JSON content without secrets and absolute paths."""
    if isinstance(content, dict):
        return {without_paths(key): _public(value) for key, value in content.items() if key != "hub_token"}
    if isinstance(content, list):
        return [_public(item) for item in content]
    return without_paths(content) if isinstance(content, str) else content


def without_paths(text: str) -> str:
    """A text whose absolute paths are relative to the working folder, or cut down to their last name."""
    here = Path.cwd()
    for folder in (here, Path(os.path.realpath(here)), Path.home()):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}{os.sep}", "")
    return _PATH.sub(lambda found: Path(found[0]).name, text)
