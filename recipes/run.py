"""One run of one stage: its inputs, its work directory, and the record it leaves.

`output_dir` appears only when the stage is done. Until then everything lives in `<output_dir>.work/`: the
log, the resolved recipe, and `checkpoint-N/` directories from which an interrupted run goes on.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trueup.recipes.directory import (
    FORMAT,
    RECORD,
    ModelDirectory,
    atomic_directory,
    check_writable,
    identity,
    open_directory,
    read_json,
    write_json,
)
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import Recipe

# Keys that cannot change what is trained: where it goes, how it is logged, shown, saved and published.
NEUTRAL_KEYS = {
    "output_dir", "run_name", "report_to", "project", "disable_tqdm", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "save_total_limit", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy",
    "hub_private_repo", "hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "skip_memory_metrics", "ddp_timeout",
    "debug",
    "eval_tasks", "eval_tasks_limit", "keep_checkpoints",
    "size",  # what follows from it are keys of their own
}  # fmt: skip

LOCK_WAIT = 60.0  # seconds a run waits for another one of the same recipe to end

_PACKAGES = ("trueup", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


def is_main_process() -> bool:
    """True on the one rank that writes, under torchrun or `accelerate launch`."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass
class Run:
    """The inputs and places of a stage that is about to run."""

    recipe: Recipe
    output_dir: Path
    parents: dict[str, ModelDirectory]
    data: list[dict[str, Any]]
    started: float = field(default_factory=time.time)
    # (model, tokenizer) -> figures that evaluations log besides; app/ puts it there.
    measure: Callable[[Any, Any], dict[str, float]] | None = None

    @property
    def work_dir(self) -> Path:
        return self.output_dir.with_name(f"{self.output_dir.name}.work")

    @property
    def inputs(self) -> str:
        """Hash of all that decides the result: stage, recipe, parents' content, data.

        Keys that only say where and how it is shown do not count, nor do this machine's own defaults, so a
        folder of runs can move to another machine and stay complete.
        """
        decisive = {
            key: value
            for key, value in self.recipe.values.items()
            if key not in NEUTRAL_KEYS
            and not self.recipe.origin[key].startswith("this machine")
            and key not in self.parents
        }
        parents = {role: parent.identity for role, parent in self.parents.items()}
        content = [self.recipe.stage, decisive, parents, self.data]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def done(self) -> bool:
        """Whether `output_dir` already holds the whole, unchanged result of these very inputs."""
        record = self.output_dir / RECORD
        if not record.exists() or read_json(record).get("inputs") != self.inputs:
            return False
        try:
            open_directory(self.output_dir)
        except TrueupError:
            return False
        return True

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Hold the work directory while the stage runs: two runs of one recipe never write to it at once.

        Raises:
            TrueupError: another process holds it and does not let go; besides what `prepare` raises.
        """
        if not is_main_process():
            yield
            return
        check_writable(self.work_dir)
        lock = FileLock(self.work_dir / ".lock")
        try:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
            if not lock.is_locked:  # a run whose starter was killed needs a moment to notice
                print(f"{self.work_dir}: another process is running this recipe; waiting for it", flush=True)
                lock.acquire(timeout=LOCK_WAIT)
        except Timeout:
            raise TrueupError(
                f"{self.work_dir}: another process is still running this recipe; stop it first"
            ) from None
        try:
            self.prepare()
            yield
        finally:
            lock.release()

    def prepare(self) -> None:
        """Make the work directory; keep it if it belongs to these inputs (resume), else start afresh.

        Raises:
            UsageError: `output_dir` exists and was not written by trueup.
            TrueupError: it cannot be written.
        """
        if self.output_dir.exists() and not (self.output_dir / RECORD).exists():
            empty = self.output_dir.is_dir() and not any(self.output_dir.iterdir())
            if not empty:
                raise UsageError(
                    f"{self.output_dir}: exists and was not written by trueup; choose another output_dir, "
                    "or move it away"
                )
        check_writable(self.work_dir)
        stamp = self.work_dir / "run.json"
        if self.work_dir.exists() and (not stamp.exists() or read_json(stamp).get("inputs") != self.inputs):
            for path in self.work_dir.iterdir():  # checkpoints of other inputs must never be resumed from
                if path.is_dir():
                    shutil.rmtree(path)
        write_json(stamp, {"inputs": self.inputs, "stage": self.recipe.stage, "recipe": self.recipe.public()})

    def publish(
        self,
        save: Callable[[Path], None],
        metrics: dict[str, float],
        tokens: int = 0,
        seeds: dict[str, int] | None = None,
    ) -> ModelDirectory:
        """Write the model directory: `save(path)` fills it, the record is added, and it appears at once.

        Args:
            save: writes a full checkpoint (weights, config, tokenizer, template, generation config, code).
            metrics: final figures of the stage.
            tokens: tokens trained on (not padded).
        """
        with atomic_directory(self.output_dir) as staging:
            save(staging)
            record = {
                "format": FORMAT,
                "stage": self.recipe.stage,
                "identity": identity(staging),
                "inputs": self.inputs,
                "parents": {role: parent.lineage for role, parent in self.parents.items()},
                "recipe": self.recipe.public(),
                "origin": {k: v for k, v in self.recipe.origin.items() if v != "default"},
                "data": self.data,
                "seeds": seeds or {"seed": self.recipe.values["seed"]},
                "metrics": metrics,
                "tokens": tokens,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "seconds": round(time.time() - self.started, 1),
                "versions": versions(),
            }
            write_json(staging / RECORD, record)
        return ModelDirectory(self.output_dir, str(record["identity"]), record)


def open_run(recipe: Recipe) -> tuple[Run, Any]:
    """The run of a recipe and its stage, with parents opened and data fingerprinted.

    Raises:
        TrueupError: a parent or the data is not there or not whole.
    """
    stage = recipe.build()
    parents = {}
    for role, (path, kind) in stage.parents().items():
        parents[role] = open_directory(path, kind, f"{recipe.origin.get(role, recipe.source)}: {role}")
    try:
        data = stage.data()
    except TrueupError as error:  # the data layer knows the file and row, the recipe where it is named
        place = recipe.origin.get("dataset_name", "default")
        raise type(error)(f"{recipe.source if place == 'default' else place}: {error}") from error
    return Run(recipe, Path(recipe.values["output_dir"]), parents, data), stage


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
