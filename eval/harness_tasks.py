"""lm-eval's tasks by name, glob or YAML file, ours among them; what is wrong is said with the fix."""

import contextlib
import difflib
import glob
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from yaml import YAMLError  # type: ignore[import-untyped]

from trueup.recipes.errors import UsageError

OURS = Path(__file__).parent / "tasks"
CHAT = "apply_chat_template"  # in a task's metadata: it asks through the chat template unless told otherwise
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group with all its tasks.

    Args:
        name: for files and tables.
        loaded: as lm-eval's `evaluate` takes it.
        shots: how many worked examples each task asks for; None where it does not say.
    """

    name: str
    loaded: dict[str, Any]
    shots: dict[str, int | None]

    @property
    def chat(self) -> bool:
        """Whether it asks through the chat template unless told otherwise."""
        return any((task.config.metadata or {}).get(CHAT) for task in self.loaded["tasks"].values())

    def documents(self, limit: int | None = None) -> int:
        """How many there are to evaluate on, at most `limit` of each task."""
        sizes = [len(task.eval_docs) for task in self.loaded["tasks"].values()]
        return sum(size if limit is None else min(size, limit) for size in sizes)


def load_tasks(names: list[str], validation: bool = False, place: str = "--tasks") -> list[LoadedTask]:
    """The tasks of names (`arc_easy`), globs (`blimp_*`), groups, tags (`lab`) and YAML files, data included.

    Args:
        validation: evaluate on a task's validation split, if it has one, rather than on its test split.
        place: where the names were written, for messages.

    Raises:
        UsageError: there is no such task, its YAML is wrong, or its data cannot be had.
    """
    found = []
    for name in names:
        manager, specs = _yaml_task(name, place) if name.endswith((".yaml", ".yml")) else _known(name, place)
        for spec in specs:
            with quietly():
                loaded = _load(manager, spec, name, place)
            for task in loaded["tasks"].values():
                _check(task, place)
                if validation and task.config.validation_split is not None:
                    task.config.test_split = None
            shots = {one: task.config.num_fewshot for one, task in loaded["tasks"].items()}
            if loaded["groups"]:
                found.append(LoadedTask(spec, loaded, shots))
            else:  # a task, or those of a tag, which have nothing in common but that
                none: dict[str, Any] = {"groups": {}, "group_map": {}}
                found += [
                    LoadedTask(one, {"tasks": {one: task}, **none}, {one: shots[one]})
                    for one, task in loaded["tasks"].items()
                ]
    return found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval's bars, prints and remarks, and those of datasets, from the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@cache
def _manager(stock: bool) -> TaskManager:
    """Ours, and if need be lm-eval's own 14,000 names, which take seconds to read."""
    return TaskManager(include_path=[OURS], include_defaults=stock)


def _known(name: str, place: str) -> tuple[TaskManager, list[Any]]:
    """A manager and the names in it that `name` stands for."""
    manager = _manager(stock=False)
    if name not in manager.all_tasks:
        manager = _manager(stock=True)
    matches = manager.match_tasks([name]) if glob.has_magic(name) else [name]
    if not matches or not set(matches) <= set(manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(
            f"{place}: {name}: there is no such task, group or tag.{hint} A task of your own is named by its "
            "YAML file"
        )
    return manager, list(matches)


def _yaml_task(name: str, place: str) -> tuple[TaskManager, list[Any]]:
    """A YAML file: a task, or a group, whose tasks may lie in files beside it."""
    path = Path(name)
    try:
        config = _own(path)
        if "group" not in config:
            return TaskManager(include_defaults=False), [{"task": path.stem, **config}]
        return _group(path, config), [config["group"]]
    except OSError as error:
        raise UsageError(f"{place}: {error.filename or name}: {error.strerror or error}") from error
    except (YAMLError, ValueError, ImportError, AttributeError) as error:
        raise UsageError(f"{place}: {name}: {error}") from error


def _group(path: Path, config: dict[str, Any]) -> TaskManager:
    """A manager that knows a group and the tasks beside its file; lm-eval's own too if it has such."""
    manager = TaskManager(include_path=[path.parent], include_defaults=False)
    members = [one if isinstance(one, str) else one.get("task") for one in config.get("task") or []]
    if not set(members) <= set(manager.all_tasks):
        manager = TaskManager(include_path=[path.parent])
    for entry in manager.task_index.values():
        if entry.yaml_path is not None and entry.yaml_path.parent.samefile(path.parent):
            entry.cfg, entry.yaml_path = _own(entry.yaml_path), None
    return manager


def _own(path: Path) -> dict[str, Any]:
    """A task's YAML file with all it includes, and two things that lm-eval would not do.

    A stock task that is pointed at local files by `include` still asks for all of its splits, so those that
    `data_files` has no file for are left out; and the files' names are looked for beside the YAML too.
    """
    config: dict[str, Any] = load_yaml(path)
    arguments = config.get("dataset_kwargs") or {}
    files = arguments.get("data_files")
    if isinstance(files, dict):
        present = {split: _beside(path, names) for split, names in files.items()}
        config["dataset_kwargs"] = arguments | {"data_files": present}
        evaluated = [config[name] for name in ("test_split", "validation_split") if config.get(name)]
        if evaluated and not set(evaluated) & set(files):
            raise ValueError(
                f"is evaluated on {' or '.join(evaluated)}, and data_files has only {', '.join(files)}; "
                "rename one, or set test_split"
            )
        config |= {name: None for name in SPLITS if config.get(name) not in files}
    return config


def _remote(config: dict[str, Any]) -> bool:
    """Whether a task's data come from the Hub."""
    return config.get("dataset_path") not in (None, *_LOCAL_FORMATS) and not config.get("custom_dataset")


def _beside(path: Path, names: Any) -> Any:
    if isinstance(names, list):
        return [_beside(path, name) for name in names]
    beside = path.parent / str(names)
    return str(beside) if beside.exists() and not Path(str(names)).exists() else names


def _load(manager: TaskManager, spec: Any, name: str, place: str) -> dict[str, Any]:
    configs = list(_configs(manager, spec))
    try:
        with _without_waiting(configs):
            return dict(manager.load([spec]))
    # No network, no such set and no such file are OSErrors, an unknown configuration is a ValueError.
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        asked = [one for one in configs if _remote(one) and str(one["dataset_path"]) in reason]
        if not asked:
            raise UsageError(f"{place}: {name}: {reason}") from error
        raise UsageError(f"{place}: {_how_to_localise(asked[0], reason)}") from error
    except KeyError as error:
        raise UsageError(
            f"{place}: {name}: its data has no split {error}; name the splits there are in its YAML file "
            f"({', '.join(SPLITS)})"
        ) from error


def _configs(manager: TaskManager, spec: Any) -> Iterator[dict[str, Any]]:
    """The configurations of all tasks that a spec leads to."""
    if isinstance(spec, str):
        entry = manager.task_index.get(spec)
        if entry is not None and entry.tags and entry.cfg is None:  # a tag
            for tagged in sorted(entry.tags):
                yield from _configs(manager, tagged)
            return
        spec = {} if entry is None else {"yaml_path": entry.yaml_path, **(entry.cfg or {})}
    if "group" not in spec:
        yield spec
        return
    for member in spec.get("task") or []:
        named = isinstance(member, dict) and set(member) & {"dataset_path", "group"}
        yield from _configs(manager, member if named or isinstance(member, str) else member["task"])


@contextlib.contextmanager
def _without_waiting(configs: list[dict[str, Any]]) -> Iterator[None]:
    """Where the Hub cannot be reached, what is not cached fails at once, not after minutes."""
    if is_offline_mode() or not any(map(_remote, configs)):
        yield
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        reachable = True
    except Exception:  # whatever the HTTP library of the day raises
        reachable = False
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _how_to_localise(config: dict[str, Any], reason: str) -> str:
    """The message for a data set of the Hub that cannot be had."""
    data, task = config["dataset_path"], config.get("task")
    subset = f" ({config['dataset_name']})" if config.get("dataset_name") else ""
    splits = [config[name] for name in SPLITS[:3] if config.get(name)]
    files = ", ".join(f"{split}: {split}.jsonl" for split in dict.fromkeys(splits))
    return (
        f"{task}: its data, {data}{subset}, cannot be had from the Hugging Face Hub: {reason}.\n"
        f"To evaluate on local files, fetch it elsewhere (hf download --repo-type dataset {data} --local-dir "
        f"DIR), copy it here, write {task}.yaml beside the files:\n\n"
        f"    include: {config.get('yaml_path')}\n"
        "    dataset_path: json              # or parquet, csv\n"
        "    dataset_name: null\n"
        f"    dataset_kwargs: {{data_files: {{{files}}}}}   # the splits you have\n\n"
        f"and name that: --tasks {task}.yaml"
    )


def _check(task: Any, place: str) -> None:
    """Raises UsageError for a task that this harness must not or cannot run."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"{place}: {task.task_name}: runs code that a model wrote; trueup does not. lm_eval itself does, "
            "with --confirm_run_unsafe_code"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{place}: {task.task_name}: is about pictures or sound, and these models read text")
