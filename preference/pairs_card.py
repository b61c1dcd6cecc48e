"""The card of a data set of pairs: what is in it, in figures."""

from dataclasses import fields
from random import Random
from typing import Any

import numpy as np

from trueup.base.data import DataArguments, data_fingerprint, load_data
from trueup.base.data_splits import prompt_key
from trueup.preference.pairs_page import Card, Figure
from trueup.preference.pairs_rows import SplitRows
from trueup.recipes.directory import RECORD, ModelDirectory, read_json
from trueup.recipes.errors import TrueupError
from trueup.recipes.hub import file_beside

QUANTILES = (5, 25, 50, 75, 95)
EXAMPLES = 3

# ---------------------------------------------------------------- figures


def figures(found: SplitRows, sft: set[str] | None) -> dict[str, Figure]:
    """What is known of a split, by its name on the card; None where there is nothing to measure.

    Args:
        sft: keys of the prompts the model was fine-tuned on; None: not known.
    """
    pairs = {} if "completion" in found.rows[0] else _pair_figures(found)
    keys = {prompt_key(row["prompt"]) for row in found.rows}
    return {
        "rows": len(found.rows),
        "prompts": found.prompts,
        "prompts_without_row": found.without,
        "prompts_too_long": found.too_long,
        "completions": found.completions,
        "cut": found.cut,
        "empty": found.empty,
        "unscored": found.unscored,
        "score_mean": _mean(found.scores),
        "score_best_mean": _mean(found.best),
        **pairs,
        "sft_overlap": None if sft is None else len(keys & sft) / len(keys),
    }


def _pair_figures(found: SplitRows) -> dict[str, Figure]:
    longer = np.array([chosen - rejected for chosen, rejected in found.lengths])
    better = [row["score_chosen"] - row["score_rejected"] for row in found.rows]
    differing = longer[longer != 0]
    labels = np.array(found.p_labels)
    noisy = "p_label" in found.rows[0]
    return {
        "ties": found.ties,
        "below_min_margin": found.close,
        "length_difference": _spread(longer),
        "chosen_longer": _mean(differing > 0),
        "score_difference": _spread(better),
        "labels_against_score": float((labels < 0.5).mean()) if noisy else None,
        "label_ceiling": label_ceiling(found.p_labels) if noisy else None,
    }


def label_ceiling(p_labels: list[float]) -> float:
    """The accuracy that the best predictor there can be, which knows all scores, expects on such labels.

    It prefers the higher score, so it agrees with a label with probability max(p, 1 - p).
    """
    return _mean([max(p, 1 - p) for p in p_labels]) or 0.0


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _spread(values: Any) -> dict[str, float]:
    found = np.percentile(values, QUANTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"{q} %": float(x) for q, x in zip(QUANTILES, found, strict=True)},
    }


# ---------------------------------------------------------------- overlap with the SFT data


def sft_prompts(start: ModelDirectory) -> tuple[set[str] | None, str]:
    """Keys of the prompts a model was fine-tuned on, by its lineage; and their data set's name, or why they
    are not known.
    """
    record = start.record
    while record and record["stage"] != "sft":
        parent = record["parents"].get("model_name_or_path", {}).get("path", "")
        path = file_beside(parent, RECORD) if parent else None
        record = read_json(path) if path else {}
    if not record:
        return None, "not known: the model's lineage has no SFT stage that is still there"
    recipe = record["recipe"]
    args = DataArguments(
        **{one.name: recipe[one.name] for one in fields(DataArguments) if one.name in recipe}
    )
    name = record["data"][0]["name"]
    if args.dataset_streaming or recipe["dataset_form"] == "text":
        return None, f"not known: {name} was a stream, or plain text"
    try:
        if data_fingerprint(args, "train")["sha256"] != record["data"][0]["sha256"]:
            return None, f"not known: {name} has changed since"
        rows: Any = load_data(args, "train", recipe["dataset_form"])
    except TrueupError as error:
        return None, f"not known: {str(error).splitlines()[0]}"
    column = "messages" if "messages" in rows.column_names else "prompt"
    return {prompt_key(row[column]) for row in rows.select_columns([column])}, name


# ---------------------------------------------------------------- the card


def make_card(made: dict[str, Any], found: dict[str, SplitRows], start: ModelDirectory) -> Card:
    """The card of all splits.

    Args:
        start: the model that was sampled from, for the overlap with its SFT data.
    """
    sft, name = sft_prompts(start)
    rows = next(iter(found.values())).rows
    examples = Random("card").sample(rows, min(EXAMPLES, len(rows)))
    return Card(made, {split: figures(one, sft) for split, one in found.items()}, name, examples)
