"""Checkpoints, not end points: reward against KL along each run, from the arms' own `frontier.jsonl`.

Those figures were taken on validation prompts while the arm was trained. They show the way; the verdict
rests on the test prompts alone.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trueup.eval.compare_samples import Arm, read_rows
from trueup.eval.frontier import FRONTIER
from trueup.recipes.directory import ModelDirectory
from trueup.recipes.hub import short_name

Point = dict[str, Any]
Trace = dict[str, Any]


def traces(arm: Arm, ranking: str, proxies: Sequence[str], spread: float) -> list[Trace]:
    """One trace per seed that left one: its points, its own best, and its hump.

    Args:
        ranking: the name of the scorer that ranks.
        proxies: those of the reward models.
        spread: the standard deviation of the ranking score over samples, which tells a fall from noise.
    """
    found = []
    for seed, model in enumerate(arm.directories):
        path = model.path / FRONTIER
        points = _points(path, model, ranking, proxies) if path.exists() else []
        if points:
            found.append({"arm": arm.name, "seed": seed, "points": points, **_shape(points, model, spread)})
    return found


def _points(path: Path, model: ModelDirectory, ranking: str, proxies: Sequence[str]) -> list[Point]:
    """{"step", "kl", "score", "proxy"} of each validation; a figure that was not measured is None.

    Where the best checkpoint is loaded at the end it is validated once more, at the last step: not a point of
    its own.
    """
    scorers = model.record.get("recipe", {}).get("scorers") or []
    first_ranks = [short_name(name) for name in scorers[:1]] == [ranking]
    found: list[Point] = []
    for line in read_rows(path):
        if line["split"] != "validation" or any(line["step"] == point["step"] for point in found):
            continue
        score = line.get(f"scorers/{ranking}", line.get("score") if first_ranks else None)
        proxy = next(
            (line[name] for name in ("reward", *(f"scorers/{one}" for one in proxies)) if name in line), None
        )
        found.append({"step": line["step"], "kl": line["kl"], "score": score, "proxy": proxy})
    return found


def _shape(points: Sequence[Point], model: ModelDirectory, spread: float) -> dict[str, Any]:
    scored = [point for point in points if point["score"] is not None]
    if not scored:
        return {"best": None, "hump": None}
    best, last = max(scored, key=lambda point: point["score"]), scored[-1]
    prompts = model.record.get("recipe", {}).get("max_eval_prompts") or 256
    noise = 1.96 * spread * math.sqrt(2 / prompts)
    falls = best["step"] < last["step"] and best["score"] - last["score"] > noise
    return {"best": best, "hump": best if falls else None}


def matched(found: Sequence[Trace]) -> dict[str, Any] | None:
    """The validation score of each arm where all had moved equally far: at the largest KL that all reached.

    Between two checkpoints along a straight line. None where fewer than two arms left a trace.
    """
    arms: dict[str, list[Trace]] = {}
    for trace in found:
        if trace["best"] is not None:
            arms.setdefault(trace["arm"], []).append(trace)
    if len(arms) < 2:
        return None
    reached = min(max(point["kl"] for point in one["points"]) for traces in arms.values() for one in traces)
    scores = {name: [_score_at(reached, one["points"]) for one in traces] for name, traces in arms.items()}
    return {
        "kl": reached,
        "scores": {name: float(np.mean(values)) for name, values in scores.items()},
        "by_seed": scores,
        "candidates": {name: len(traces[0]["points"]) for name, traces in arms.items()},
    }


def _score_at(kl: float, points: Sequence[Point]) -> float:
    """On the way out: where the trace first reaches this KL."""
    scored = [(point["kl"], point["score"]) for point in points if point["score"] is not None]
    for (before, low), (after, high) in pairwise(scored):
        if before <= kl <= after and after > before:
            return float(low + (high - low) * (kl - before) / (after - before))
    return float(min(scored, key=lambda pair: abs(pair[0] - kl))[1])
