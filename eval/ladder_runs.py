"""Pretraining runs of one folder on one text: what differs between them, and what came of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trueup.recipes.directory import ModelDirectory, parameter_count
from trueup.recipes.run import NEUTRAL_KEYS

BASELINE = "baseline"  # the name of the run that others are held against, where one is called so
LOG = "log.jsonl"

Json = dict[str, Any]


@dataclass(frozen=True)
class PretrainingRun:
    """One of them.

    Args:
        differs: key -> its value in the recipe, where that is not the baseline's.
        width, learning_rate, init: what a learning rate's transfer is read from.
    """

    name: str
    path: str
    differs: dict[str, Any]
    parameters: int
    bits_per_byte: float
    above_floor: float | None
    seconds: float
    width: int
    learning_rate: float
    init: str

    @property
    def difference(self) -> str:
        """learning_rate: 0.01, warmup_steps: 0"""
        return ", ".join(f"{key}: {_said(value)}" for key, value in self.differs.items())


@dataclass(frozen=True)
class RunGroup:
    """Runs in one folder that read the same text; the best first.

    Args:
        baseline: the name of the one that the others are held against.
    """

    folder: str
    baseline: str
    runs: list[PretrainingRun]

    @property
    def tries_rates(self) -> bool:
        """Whether they say how well a learning rate transfers from one width to another."""
        return all(len({getattr(run, name) for run in self.runs}) > 1 for name in ("width", "learning_rate"))


def run_groups(runs: Iterable[ModelDirectory]) -> list[RunGroup]:
    """Two or more pretraining runs, by folder and text. One that measured no held-out text is left out."""
    groups: dict[tuple[str, str], list[ModelDirectory]] = {}
    for run in runs:
        if run.record["stage"] == "pretrain" and "bits_per_byte" in run.record["metrics"]:
            text = [part.get("sha256") for part in run.record["data"] if part["split"] != "tokenizer"]
            groups.setdefault((str(run.path.parent), json.dumps(text)), []).append(run)
    return [_group(folder, group) for (folder, _), group in groups.items() if len(group) > 1]


def _group(folder: str, runs: Sequence[ModelDirectory]) -> RunGroup:
    baseline = next((run for run in runs if run.path.name == BASELINE), runs[0])
    found = [_run(run, _differences(run.record["recipe"], baseline.record["recipe"])) for run in runs]
    found.sort(key=lambda run: run.bits_per_byte)
    return RunGroup(folder, baseline.path.name, found)


def _run(run: ModelDirectory, differs: Json) -> PretrainingRun:
    metrics, recipe = run.record["metrics"], run.record["recipe"]
    return PretrainingRun(
        run.path.name,
        str(run.path),
        differs,
        parameter_count(run.path),
        metrics["bits_per_byte"],
        metrics.get("above_floor"),
        run.record["seconds"],
        recipe["hidden_size"],
        recipe["learning_rate"],
        recipe["init"],
    )


def _differences(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> Json:
    return {
        key: recipe.get(key)
        for key in dict.fromkeys([*recipe, *other])
        if key not in NEUTRAL_KEYS and recipe.get(key) != other.get(key)
    }


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
