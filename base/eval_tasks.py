"""Benchmarks along the way: the keys of every stage that trains a language model.

What they name is measured by `Run.measure`, which `app/` puts together: no stage knows an instrument.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EvalTasksArguments:
    """What else is measured at each evaluation; logged, and never used to choose a checkpoint."""

    eval_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-eval, as `trueup eval --tasks` takes them, measured at each evaluation on "
            "their validation split if they have one."
        },
    )
    eval_tasks_limit: int | None = field(
        default=200, metadata={"help": "Documents of each of these tasks, at most; null: all."}
    )


def eval_tasks_contradictions(given: dict[str, Any]) -> list[tuple[str, str]]:
    """See `trueup.recipes.stages.Stage`."""
    found = []
    if given.get("eval_tasks") and given.get("eval_strategy") == "no":
        found.append(("eval_tasks", "are measured at evaluations, and eval_strategy is no"))
    if "eval_tasks_limit" in given and not given.get("eval_tasks"):
        found.append(("eval_tasks_limit", "is read with eval_tasks; add that, or delete it"))
    limit = given.get("eval_tasks_limit")
    if limit is not None and limit < 1:
        found.append(("eval_tasks_limit", "must be at least 1, or null for all documents"))
    return found
