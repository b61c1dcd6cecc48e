"""The models that the app was given: found by folder or Hub id, loaded when first used, shared, evicted."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueup.eval.report import REPORT
from trueup.recipes.directory import (
    RECORD,
    is_comparison,
    is_data_set,
    open_directory,
    read_json,
    short_names,
)
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import config_of, is_hub_id, local_directory
from trueup.recipes.machine import accelerator

if TYPE_CHECKING:
    from trueup.eval.scorers import RewardModelScorer

Kind = Literal["chat", "reward", "report"]
DEEP = 3  # folders below a given one that are looked into
_TUNED = ("dpo", "kto", "ppo", "rloo", "grpo")  # stages that are held to the model they start from


@dataclass(frozen=True)
class Entry:
    """Something that the app was given.

    Args:
        name: how people call it: the end of its path, as long as it takes to be told from the others.
        place: a directory, or a Hub id.
    """

    name: str
    place: str
    kind: Kind


@dataclass
class Loaded:
    """A model in memory.

    Args:
        identity: the content hash of its directory.
        raw: it continues text instead of answering.
        scorer: of a reward model, which has no `model`.
    """

    name: str
    identity: str
    record: dict[str, Any]
    bytes: int
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    raw: bool = False
    scorer: "RewardModelScorer | None" = field(default=None, repr=False)
    users: int = 0
    used: float = 0.0

    @property
    def reference(self) -> str | None:
        """The identity of the model it was tuned from and held to."""
        if self.record.get("stage") not in _TUNED:
            return None
        found: str | None = self.record["parents"].get("model_name_or_path", {}).get("identity")
        return found


# ---------------------------------------------------------------------------------------------- what there is


def find_entries(places: Sequence[str]) -> list[Entry]:
    """The chat models, reward models and comparisons at and below these places, in their order.

    What is no directory is a Hub id, whose weights are downloaded when it is used.

    Raises:
        UsageError: nothing is there.
    """
    found: dict[Path, tuple[str, Kind]] = {}  # by its whole path: one may be named in two ways
    for place in places:
        if Path(place).is_dir():
            below = list(_runs(Path(place), DEEP))
            if not below:
                raise UsageError(f"{place}: no model and no comparison is in there; name the output of a run")
            found |= {Path(os.path.abspath(path)): (str(path), kind) for path, kind in below}
        elif is_hub_id(place):
            found[Path(place)] = (place, _hub_kind(place))
        else:
            raise UsageError(f"{place}: no such directory, nor is it a Hub id (org/name)")
    names = short_names(path for path in found if path.is_absolute())
    return [Entry(names.get(path, place), place, kind) for path, (place, kind) in found.items()]


def _runs(folder: Path, deep: int) -> Iterator[tuple[Path, Kind]]:
    kind = _kind(folder)
    if kind:
        yield folder, kind
    elif deep and not is_data_set(folder):
        if (folder / REPORT).is_file():  # the ladder that `trueup report` leaves beside the runs
            yield folder, "report"
        for below in sorted(folder.iterdir()):
            # Not the work directories of runs, nor what a newer run has replaced.
            if below.is_dir() and not below.name.endswith((".work", ".previous")) and below.name[0] != ".":
                yield from _runs(below, deep - 1)


def _kind(folder: Path) -> Kind | None:
    if is_comparison(folder):
        return "report"
    if not (folder / "config.json").exists():
        return None
    try:
        return _kind_of_config(read_json(folder / "config.json"))
    except TrueupError:
        return "chat"  # damaged: its pane says so when it is chosen


def _hub_kind(name: str) -> Kind:
    """By its configuration; what cannot be had now says why when it is used."""
    return _kind_of_config(config_of(name) or {}) or "chat"


def _kind_of_config(config: dict[str, Any]) -> Kind | None:
    names = config.get("architectures") or ["ForCausalLM"]
    if names[0].endswith("ForSequenceClassification"):
        return "reward"
    return "chat" if names[0].endswith(("ForCausalLM", "ForConditionalGeneration")) else None


# ------------------------------------------------------------------------------------------------ loading

# Transformers' loading has state of its own: of two models at once, one misses its tied head.
_TRANSFORMERS = threading.Lock()


class ModelPool:
    """Loads models when they are asked for and keeps them until the memory is wanted by others.

    Args:
        entries: what may be used; no other path is ever opened.
        memory: bytes that all weights together may take.
    """

    def __init__(self, entries: Sequence[Entry], memory: int) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.memory = memory
        self.loaded: dict[str, Loaded] = {}
        self._lock = threading.Lock()
        self._loading = {name: threading.Lock() for name in self.entries}

    def names(self, kind: Kind) -> list[str]:
        """The names of one kind, in the order given."""
        return [entry.name for entry in self.entries.values() if entry.kind == kind]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Loaded]:
        """A model, which stays in memory as long as the block lasts.

        Raises:
            UsageError: there is no such model.
            TrueupError: it cannot be loaded, or there is no room for it.
        """
        if name not in self.entries:
            raise UsageError(f"{name!r} is none of the models here: {', '.join(self.entries)}")
        loaded = self._take(name)
        try:
            yield loaded
        finally:
            with self._lock:
                loaded.users -= 1
                loaded.used = time.monotonic()

    def by_identity(self, identity: str | None) -> str | None:
        """The name of the chat model with this content, if one was given, as its record tells."""
        if identity is None:
            return None
        for name in self.names("chat"):
            record = Path(self.entries[name].place) / RECORD
            if record.exists() and read_json(record).get("identity") == identity:
                return name
        return None

    def _take(self, name: str) -> Loaded:
        with self._loading[name]:  # two who ask for one model load it once, and hold up nobody else
            with self._lock:
                if name in self.loaded:
                    self.loaded[name].users += 1
                    return self.loaded[name]
            entry = self.entries[name]
            folder = Path(local_directory(entry.place))
            need = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            with self._lock:
                self._make_room(name, need)
                # Counted from here on: two models that load at once must not both find the same room.
                self.loaded[name] = Loaded(name, "", {}, need, users=1)
            try:
                with _TRANSFORMERS:
                    fresh = _load(entry, folder, need)
            except BaseException:
                with self._lock:
                    del self.loaded[name]
                raise
            with self._lock:
                fresh.users = 1
                self.loaded[name] = fresh
            return fresh

    def _make_room(self, name: str, need: int) -> None:
        """Drop those that have been idle for longest until `need` bytes are free."""
        idle = sorted((one for one in self.loaded.values() if not one.users), key=lambda one: one.used)
        while (free := self.memory - sum(one.bytes for one in self.loaded.values())) < need and idle:
            del self.loaded[idle.pop(0).name]
        if free < need:
            busy = " and others are answering; try again in a moment" if self.loaded else ""
            raise TrueupError(
                f"{name} takes {_gib(need)}, and {_gib(free)} of {_gib(self.memory)} are free{busy}; "
                "--memory sets how much all models may take"
            )


def _load(entry: Entry, folder: Path, size: int) -> Loaded:
    from transformers.utils.logging import disable_progress_bar

    from trueup.eval.loading import load_policy
    from trueup.eval.scorers import RewardModelScorer

    disable_progress_bar()
    opened = open_directory(folder, "reward" if entry.kind == "reward" else "causal-lm")
    if entry.kind == "reward":
        scorer = RewardModelScorer.open(folder)
        return Loaded(entry.name, opened.identity, opened.record, size, scorer=scorer)
    model, tokenizer = load_policy(folder)
    raw = tokenizer.chat_template is None or opened.record.get("stage") == "pretrain"
    placed: Any = model  # as a plain module: Transformers hides the signature of `to`
    return Loaded(entry.name, opened.identity, opened.record, size, placed.to(accelerator()), tokenizer, raw)


def default_memory() -> int:
    """Half of what is free now, on the accelerator if there is one."""
    import torch

    if accelerator() == "cuda":
        return torch.cuda.mem_get_info()[0] // 2
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available // 2)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g} GiB"
