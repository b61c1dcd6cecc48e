"""What a comparison rests on: every model, its data and recipe by hash, seeds, versions, times and tokens."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trueup.eval.compare_lineage import tree
from trueup.eval.compare_samples import Answers
from trueup.recipes.directory import ModelDirectory
from trueup.recipes.run import Run, versions


def manifest(
    run: Run, verdict: Mapping[str, Any], answers: Mapping[str, Sequence[Answers]]
) -> dict[str, Any]:
    """The manifest, JSON-able; of all that the folder holds the times alone change from run to run."""
    generated = {
        arm: sum(len(row["ids"]) for one in said for row in one.rows) for arm, said in answers.items()
    }
    return {
        "recipe": run.recipe.public(),
        "inputs": run.inputs,
        "data": run.data,
        "models": {role: _model(one) for role, one in run.parents.items()},
        "sampler_seeds": [verdict["seed"] + repetition for repetition in range(verdict["seeds"])],
        "versions": versions(),
        "tokens_generated": generated,
        "seconds": round(time.time() - run.started, 1),
    }


def _model(model: ModelDirectory) -> dict[str, Any]:
    record = model.record
    told = json.dumps(record.get("recipe", {}), sort_keys=True, default=str)
    return {
        "path": model.name,
        "identity": model.identity,
        "stage": record.get("stage", "foreign"),
        "recipe_sha256": hashlib.sha256(told.encode()).hexdigest() if record else None,
        "data": record.get("data", []),
        "seeds": record.get("seeds", {}),
        "tokens_trained": record.get("tokens"),
        "seconds": record.get("seconds"),
        "versions": record.get("versions", {}),
        "lineage": [
            {"depth": depth, "role": role, **{key: one[key] for key in ("stage", "path", "identity")}}
            for depth, role, one in tree(model)
        ],
    }
