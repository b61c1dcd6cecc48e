"""The alignment tax: what alignment did to what the model knew before.

Bits per byte on held-out text, and the results of lm-eval that lie in the directories (`eval/*.json`).
"""

import math
from collections.abc import Sequence
from typing import Any

from trueup.base.tokenizer import encode_documents
from trueup.eval.kl import completion_log_probs
from trueup.eval.sampler import Sample
from trueup.recipes.directory import ModelDirectory, read_json

Figures = dict[str, dict[str, float | None]]  # "task metric" -> {"value", "stderr"}, None if not known


def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Bits a model needs per byte of text; documents longer than its context are cut into pieces."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    pieces = [
        Sample(ids[start : start + 1], ids[start + 1 : start + context], "", True)
        for ids in encode_documents(tokenizer, list(texts))
        for start in range(0, len(ids) - 1, context - 1)
    ]
    nats = -sum(float(values.double().sum()) for values in completion_log_probs(model, pieces))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def lm_eval_results(model: ModelDirectory) -> Figures:
    """What lm-eval measured on a model: of the files in its `eval/`, those that hold `results`."""
    found: Figures = {}
    for path in sorted((model.path / "eval").glob("*.json")):
        content = read_json(path)
        results = content.get("results", {}) if isinstance(content, dict) else {}
        for task, metrics in results.items():
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if isinstance(value, int | float) and not metric.endswith("_stderr"):
                    stderr = metrics.get(f"{metric}_stderr,{kind}")  # "N/A" where lm-eval has none
                    known = float(stderr) if isinstance(stderr, int | float) else None
                    found[f"{task} {metric}"] = {"value": float(value), "stderr": known}
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
