"""Where rows come from: a set of the lab, local files, or the Hub. One class each, one interface.

`open_source` decides which a name means, and which of the set's own splits (if it has any) answers for the
split asked for. What the set does not have is cut out of its train split by the hash of the prompt:
`Source.shares`.
"""

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from trueup.base.data_files import find_files, has_known_suffix, is_data, read_rows
from trueup.base.formats import BadRow, Row
from trueup.recipes.directory import RECORD
from trueup.recipes.errors import TrueupError, UsageError, nearest_path

LAB = "lab/"

# Words that name a split, as first or last word of a file's name or as its folder (Hugging Face's
# convention).
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
# Hugging Face's shards carry the exact name: train_sft-00000-of-00003.parquet.
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class SetConfig:
    """One set of a mixture: the keys of TRL's DatasetConfig, and alignment-handbook's `weight`.

    `fraction` is TRL's target share of the mixture, `weight` the share of the set's own rows that is kept.
    `options` go to the lab's generator or to `datasets.load_dataset`.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str | None = None
    columns: tuple[str, ...] | None = None
    fraction: float | None = None
    weight: float | None = None
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class SplitPlan:
    """The split wanted, what the recipe calls the three, and the shares of those the set does not have."""

    wanted: str
    names: dict[str, str]
    sizes: dict[str, float]

    def choose(self, config: SetConfig, available: Collection[str]) -> tuple[str, dict[str, float] | None]:
        """(the set's own split to read, shares to cut from it by hash; None to take it whole)."""
        base = config.split or self.names["train"]
        # A set taken from another of its splits than the recipe's train is a set by itself, cut by hash.
        whole = base == self.names["train"]
        owned = {part: whole and self.names[part] in available for part in self.sizes}
        if owned.get(self.wanted):
            return self.names[self.wanted], None
        if available and re.fullmatch(r"[\w.]+", base) and base not in available:
            raise UsageError(
                f"{config.path}: it has no split '{base}', but: {', '.join(sorted(available))}. "
                "Name the right one with dataset_train_split."
            )
        shares = {part: 0.0 if owned[part] else size for part, size in self.sizes.items()}
        if self.wanted != "train" and not shares[self.wanted]:
            size = f"{self.wanted}_split_size"
            raise UsageError(
                f"{config.path}: it has no split '{self.names[self.wanted]}', and {size} is 0. "
                f"Set {size} to the share of prompts to hold out, such as 0.05."
            )
        return base, shares if any(shares.values()) else None


class Source(Protocol):
    """Rows of one set in one split."""

    name: str
    shares: dict[str, float] | None
    notes: list[str]

    def shards(self) -> list[str]:
        """What is read, in order; a stream deals them out to its workers."""
        ...

    def read(self, shard: str, notes: list[str]) -> Iterator[tuple[int, Row | BadRow]]: ...

    def place(self, shard: str, number: int) -> str: ...

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the content, JSON-able; always with a `sha256`."""
        ...


def open_source(config: SetConfig, plan: SplitPlan, streaming: bool) -> Source:
    """The source a name means: `lab/...`, then what exists on this disk, then the Hub.

    Raises UsageError for a name that can only be a missing file, and for splits the set does not have.
    """
    if config.path.startswith(LAB):
        return LabSource.open(config, plan)
    path = os.path.expanduser(config.path)
    generic = config.path in ("json", "csv", "parquet", "text") and config.data_files
    looks_local = os.path.exists(path) or glob.has_magic(path) or has_known_suffix(path)
    if generic or looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        return FileSource.open(config, plan)
    return HubSource.open(config, plan, streaming)


# ---------------------------------------------------------------------------------------------------- the lab


@dataclass
class LabSource:
    """A set of the embedded lab, whose splits are its own (disjoint in the facts asked)."""

    name: str
    split: str
    options: dict[str, Any]
    shares: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, config: SetConfig, plan: SplitPlan) -> "LabSource":
        from trueup.recipes.lab.datasets import NAMES

        if config.path not in NAMES:
            near = difflib.get_close_matches(config.path, list(NAMES), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"{config.path}: the lab has no such set, but: {', '.join(NAMES)}.{hint}")
        if config.split not in (None, "train"):
            raise UsageError(
                f"{config.path}: split '{config.split}': a stage takes each of the lab's splits itself."
            )
        return cls(config.path, plan.wanted, dict(config.options))

    def shards(self) -> list[str]:
        return [self.name]

    def read(self, shard: str, notes: list[str]) -> Iterator[tuple[int, Row | BadRow]]:
        from trueup.recipes.lab.datasets import rows

        yield from enumerate(rows(shard, self.split, **self.options), start=1)

    def place(self, shard: str, number: int) -> str:
        return f"{shard} {self.split} row {number}"

    def fingerprint(self) -> dict[str, Any]:
        from trueup.recipes.lab.datasets import fingerprint

        return {"sha256": fingerprint(self.name, self.split, **self.options)}


# ------------------------------------------------------------------------------------------------ local files


@dataclass
class FileSource:
    """Local files. In a folder, train.jsonl, x-valid.txt or test/ name splits; all other files are train."""

    name: str
    files: list[str]
    shares: dict[str, float] | None
    notes: list[str]

    @classmethod
    def open(cls, config: SetConfig, plan: SplitPlan) -> "FileSource":
        if config.options:
            unknown = ", ".join(name for name, _ in config.options)
            raise UsageError(f"{config.path}: dataset_options has {unknown}, which local files do not take.")
        if config.split and "[" in config.split:
            raise UsageError(
                f"{config.path}: split '{config.split}': slices are for Hub sets, not local files."
            )
        groups = _files_by_split(config, plan)
        split, shares = plan.choose(config, groups)
        return cls(
            config.path, [str(file) for file in groups[split]], shares, _said_of(config, groups, split)
        )

    def shards(self) -> list[str]:
        return list(self.files)

    def read(self, shard: str, notes: list[str]) -> Iterator[tuple[int, Row | BadRow]]:
        return read_rows(Path(shard), notes)

    def place(self, shard: str, number: int) -> str:
        return f"{shard}:{number}"

    def fingerprint(self) -> dict[str, Any]:
        """By content and order. Names, folders and times do not count: a copy is the same data.

        The bytes on disk are what is hashed, so the same rows compressed are other data.
        """
        try:
            stats = [os.stat(file) for file in self.files]
            digests = [
                _digest(file, s.st_size, s.st_mtime_ns) for file, s in zip(self.files, stats, strict=True)
            ]
        except OSError as error:
            raise TrueupError(f"{error.filename}: cannot be read: {error.strerror}.") from error
        sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return {"sha256": sha256, "files": len(digests), "bytes": sum(stat.st_size for stat in stats)}


@lru_cache(maxsize=100_000)
def _digest(file: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; within a process, size and time tell whether it has to be read again."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_by_split(config: SetConfig, plan: SplitPlan) -> dict[str, list[Path]]:
    """The files of each split the set itself names; one group, the base split, where it names none."""
    base = config.split or plan.names["train"]
    root = Path(config.path).expanduser()
    folder = config.data_dir or config.name
    if folder:
        root = root / folder
        if not root.is_dir():
            raise UsageError(f"{root}: no such folder (from dataset_config or data_dir){nearest_path(root)}")
    if config.data_files:
        inside = root if root.is_dir() else Path()
        given = config.data_files
        groups = given if isinstance(given, dict) else {base: given}
        return {split: _all_files(inside, patterns) for split, patterns in groups.items()}
    if not root.is_dir():
        return {base: find_files(config.path)}
    groups = {}
    made_here = (root / RECORD).exists()  # by a stage: beside the rows stand its record and its card
    for file in find_files(str(root / "*.jsonl") if made_here else str(root)):
        split = _split_named_by(file.relative_to(root), set(plan.names.values())) or base
        groups.setdefault(split, []).append(file)
    return groups


def _all_files(folder: Path, patterns: str | list[str]) -> list[Path]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [file for pattern in patterns for file in find_files(str(folder / Path(pattern).expanduser()))]


def _split_named_by(file: Path, names: set[str]) -> str | None:
    stem = file.name.split(".")[0]
    if shard := _SHARD.match(stem):
        return shard["split"]
    if stem in names:
        return stem
    words = re.split(r"[-_ ]", stem.lower())
    found = (_SPLIT_WORDS.get(word) for word in (words[0], words[-1], *map(str.lower, file.parts[:-1])))
    return next((split for split in found if split), None)


def _said_of(config: SetConfig, groups: dict[str, list[Path]], split: str) -> list[str]:
    """What was decided by the names of files, in words: which are of other splits, which are not data."""
    notes = [
        f"{len(files)} files are of split {other} ({files[0].name}{', ...' if len(files) > 1 else ''})"
        for other, files in groups.items()
        if other != split
    ]
    root = Path(config.path).expanduser()
    files = [file.relative_to(root) for file in root.rglob("*") if file.is_file()] if root.is_dir() else []
    if ignored := sorted(file.name for file in files if not is_data(file)):
        notes.append(f"{len(ignored)} files are not data ({ignored[0]}{', ...' if len(ignored) > 1 else ''})")
    return notes


# ---------------------------------------------------------------------------------------------------- the Hub


@dataclass
class HubSource:
    """A set of the Hugging Face Hub, through `datasets.load_dataset`; identified by its commit."""

    name: str
    shares: dict[str, float] | None
    split: str
    revision: str
    arguments: dict[str, Any]
    streaming: bool
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, config: SetConfig, plan: SplitPlan, streaming: bool) -> "HubSource":
        arguments = {
            "path": config.path,
            "name": config.name,
            "data_dir": config.data_dir,
            "data_files": config.data_files,
            **dict(config.options),
        }
        builder = _from_hub("load_dataset_builder", arguments)
        available = list(builder.info.splits or builder.config.data_files or ())
        split, shares = plan.choose(config, available)
        return cls(config.path, shares, split, str(builder.hash), arguments, streaming)

    def shards(self) -> list[str]:
        return [self.name]

    def read(self, shard: str, notes: list[str]) -> Iterator[tuple[int, Row | BadRow]]:
        rows = _from_hub("load_dataset", self.arguments | {"split": self.split, "streaming": self.streaming})
        yield from enumerate(rows, start=1)

    def place(self, shard: str, number: int) -> str:
        return f"{shard} {self.split} row {number}"

    def fingerprint(self) -> dict[str, Any]:
        described = json.dumps([self.arguments, self.split, self.revision], default=str)
        return {"sha256": hashlib.sha256(described.encode()).hexdigest(), "revision": self.revision}


def _from_hub(function: str, arguments: dict[str, Any]) -> Any:
    """`datasets.<function>`, whose ways to fail (no network, no such set or config) become one error."""
    import datasets

    name = arguments["path"]
    try:
        return getattr(datasets, function)(**arguments)
    # ConnectionError and DatasetNotFoundError are OSErrors, an unknown configuration is a ValueError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        offline = (
            " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") else ""
        )
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TrueupError(
            f"{name}: not a file or folder here, and not loaded from the Hub: {reason}.{offline} "
            f"Without network, fetch it elsewhere (hf download --repo-type dataset {name} --local-dir DIR), "
            "copy DIR here, and set dataset_name: DIR."
        ) from error
