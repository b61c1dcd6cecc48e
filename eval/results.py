"""lm-eval's results as they lie in model directories (`eval/*.json`), and what alignment did to them."""

import math
from dataclasses import dataclass
from typing import Any

from trueup.recipes.directory import ModelDirectory, read_json

Report = dict[str, Any]
Figures = dict[str, dict[str, float | None]]  # "task metric" -> {"value", "stderr"}, None if not known


def lm_eval_results(model: ModelDirectory) -> Figures:
    """What lm-eval measured on a model: of the files in its `eval/`, those that hold `results`.

    Named `TASK METRIC`, and where `trueup eval` asked otherwise than the task does, `TASK METRIC (5-shot)`:
    such a score is compared with its like alone.
    """
    found: Figures = {}
    for path in sorted((model.path / "eval").glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("identity", model.identity) != model.identity:
            continue
        variant = content.get("variant") or []
        for task, metrics in content.get("results", {}).items():
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if not kind or not isinstance(value, int | float) or metric.endswith("_stderr"):
                    continue
                how = ", ".join([*([kind] if kind != "none" else []), *variant])
                stderr = metrics.get(f"{metric}_stderr,{kind}")  # "N/A" where lm-eval has none
                found[f"{task} {metric}" + (f" ({how})" if how else "")] = {
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                }
    return found


def tax(after: Figures, before: Figures) -> Figures:
    """After - before, task by task, with the standard error of the difference."""
    found: Figures = {}
    for name in (name for name in after if name in before):
        one, other = after[name], before[name]
        errors = (one["stderr"], other["stderr"])
        found[name] = {
            "value": (one["value"] or 0.0) - (other["value"] or 0.0),
            "stderr": None if None in errors else math.hypot(*(error or 0.0 for error in errors)),
        }
    return found


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Args:
        stderr: None where it is not known.
        better: 1 where higher is better, -1 where lower is, 0 where nobody says.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    better: int
    documents: int
    chance: float | None


def figures(report: Report) -> list[Figure]:
    """All figures of a report, a group before its tasks."""
    found = []
    groups = report.get("groups", {})
    for task in sorted(report["results"], key=lambda name: name not in groups):
        metrics = report["results"][task]
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            higher = report["higher_is_better"].get(task, {}).get(metric)
            found.append(
                Figure(
                    task,
                    metric if kind == "none" else f"{metric} ({kind})",
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    0 if higher is None else 1 if higher else -1,
                    _documents(report, task),
                    report["chance"].get(task) if metric in ("acc", "acc_norm", "acc_bytes") else None,
                )
            )
    return found


def _documents(report: Report, name: str) -> int:
    """How many a task was measured on, or a group's tasks together."""
    if name in report["n-samples"]:
        return int(report["n-samples"][name]["effective"])
    return sum(_documents(report, member) for member in report["group_subtasks"].get(name, []))
