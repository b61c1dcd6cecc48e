"""Checkpoints of a run under way: whole or not there, verified before they are trusted, the newest first.

Weights, optimizer and scaler are written by Accelerate, which knows how FSDP and DeepSpeed share them out.
Beside them stand `state.json`, what the loop itself has to remember, and `checksums.json`, to find damage.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trueup.recipes.directory import atomic_directory, read_json, write_json
from trueup.recipes.errors import TrueupError, UsageError

CHECKSUMS = "checksums.json"
STATE = "state.json"


class Checkpoints:
    """The `checkpoint-N` directories of one run; N steps were done when it was written."""

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int | None, say: Callable[[str], None]):
        self.accelerator, self.folder, self.limit, self.say = accelerator, folder, limit, say

    def save(self, step: int, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Write `checkpoint-<step>`, then drop the oldest beyond the limit.

        Args:
            state: what the loop remembers, the same on all processes.
            own: what differs from process to process; comes back to the same process.

        Raises:
            TrueupError: the disk is full or read-only; older checkpoints are untouched.
        """
        accelerator = self.accelerator
        with self._staging(self.folder / f"checkpoint-{step}") as staging, _quiet_accelerate():
            accelerator.save_state(str(staging))
            everyones = gather_object([own])
            if accelerator.is_main_process:
                write_json(staging / STATE, {"step": step, "own": everyones, **state})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(staging / CHECKSUMS, checksums_of(staging))
        if accelerator.is_main_process and self.limit:
            for path in self._newest_first()[self.limit :]:
                shutil.rmtree(path)
        accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _staging(self, target: Path) -> Iterator[Path]:
        """One temporary directory for all processes; the main one lets it appear."""
        with contextlib.ExitStack() as stack:
            main = self.accelerator.is_main_process
            path = stack.enter_context(atomic_directory(target)) if main else None
            [path] = broadcast_object_list([path])
            assert path is not None
            yield path

    def load(self, which: bool | str | None) -> dict[str, Any] | None:
        """Load a checkpoint into the prepared objects and return its state; None if training begins afresh.

        Args:
            which: None or True the newest whole one, False none, a path that one.

        Raises:
            UsageError: the path is no checkpoint.
            TrueupError: the checkpoint at the path is damaged.
        """
        path = self._choose(which) if self.accelerator.is_main_process else None
        [path] = broadcast_object_list([path])
        if path is None:
            return None
        with _quiet_accelerate():
            self.accelerator.load_state(str(path))
        state: dict[str, Any] = read_json(path / STATE)
        everyones = state.pop("own")
        index = self.accelerator.process_index
        return state | {"own": everyones[index] if index < len(everyones) else {}}

    def _choose(self, which: bool | str | None) -> Path | None:
        for leftover in self.folder.glob(".checkpoint-*.partial-*"):  # of a run that was killed while writing
            shutil.rmtree(leftover)
        if isinstance(which, str):
            if problem := problem_of(Path(which)):
                kind = TrueupError if Path(which).is_dir() else UsageError
                raise kind(f"resume_from_checkpoint: {which}: {problem}")
            return Path(which)
        for path in self._newest_first():
            problem = "resume_from_checkpoint is false" if which is False else problem_of(path)
            if not problem:
                self.say(f"resuming from {path}")
                return path
            self.say(f"{path}: {problem}; removed, going on from the one before")
            shutil.rmtree(path)
        return None

    def _newest_first(self) -> list[Path]:
        numbered = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        }
        return [numbered[number] for number in sorted(numbered, reverse=True)]

    def clear(self) -> None:
        """Remove all of them: the run is done."""
        if self.accelerator.is_main_process:
            for path in self._newest_first():
                shutil.rmtree(path)


def checksums_of(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / CHECKSUMS).exists():
        return "not a whole checkpoint" if path.is_dir() else "no such checkpoint"
    try:
        expected = read_json(path / CHECKSUMS)
    except TrueupError:
        return f"{CHECKSUMS} is damaged"
    found = checksums_of(path)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    return f"{', '.join(wrong)} missing or damaged" if wrong else None


@contextlib.contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Accelerate warns of every tied matrix it stores once, which is what is wanted."""
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
