"""The card of a data set of pairs: what is in it, said in figures and in a page."""

from dataclasses import dataclass, fields
from random import Random
from typing import Any

import numpy as np

from trueup.base.data import DataArguments, data_fingerprint, load_data
from trueup.base.data_splits import prompt_key
from trueup.eval.rendering import plain
from trueup.preference.pairs_rows import SplitRows
from trueup.recipes.directory import RECORD, ModelDirectory, read_json
from trueup.recipes.errors import TrueupError
from trueup.recipes.hub import file_beside

QUANTILES = (5, 25, 50, 75, 95)
EXAMPLES = 3

Figure = int | float | dict[str, float] | None


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


@dataclass
class Card:
    """Figures of every split, how the data was made, and a few rows picked at random.

    Args:
        made: what was decided, in words: model, scorer, rule, labeller.
        sft: the SFT data set's name, or why it is not known.
    """

    made: dict[str, Any]
    splits: dict[str, dict[str, Figure]]
    sft: str
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For card.json."""
        return {"made": self.made, "splits": self.splits, "sft_data": self.sft, "examples": self.examples}

    def table(self) -> list[str]:
        """Lines: a Markdown table of figures by split, as readable on a terminal."""
        names = [*self.splits]
        rows = [["", *names]]
        for figure in self.splits[names[0]]:
            cells = [_show(figure, self.splits[name][figure]) for name in names]
            if any(cell != "-" for cell in cells):
                rows.append([figure.replace("_", " "), *cells])
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines = [
            "| "
            + " | ".join(
                cell.ljust(width) if not place else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
            for row in rows
        ]
        rule = "|" + "|".join("-" * (width + 1) + ("-" if not n else ":") for n, width in enumerate(widths))
        return [lines[0], rule + "|", *lines[1:]]

    def page(self) -> str:
        """The card as Markdown, with the head by which the Hub and `datasets` tell rows from records."""
        files = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in self.splits)
        made = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in self.made.items())
        parts = [
            f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---",
            "# Data card",
            f"{made}\n- sft data: {self.sft}",
            "\n".join(self.table()),
            _LEGEND,
            "## Rows picked at random",
            "\n\n---\n\n".join(map(_example, self.examples)),
        ]
        return "\n\n".join(parts) + "\n"


def make_card(made: dict[str, Any], found: dict[str, SplitRows], start: ModelDirectory) -> Card:
    """The card of all splits.

    Args:
        start: the model that was sampled from, for the overlap with its SFT data.
    """
    sft, name = sft_prompts(start)
    rows = next(iter(found.values())).rows
    examples = Random("card").sample(rows, min(EXAMPLES, len(rows)))
    return Card(made, {split: figures(one, sft) for split, one in found.items()}, name, examples)


_SHARES = {"chosen_longer", "labels_against_score", "label_ceiling", "sft_overlap"}

# What the page says of the figures whose names do not.
_LEGEND = """- cut, empty, unscored: completions that were no answer, and so were not used
- ties, below min margin: comparisons dropped
- length difference, score difference: of chosen less rejected, in tokens and in scores; \
mean (quantiles of 5, 25, 50, 75, 95 %)
- chosen longer: of the pairs that differ in length
- label ceiling: the accuracy on such labels to be expected of a predictor that knows every score
- sft overlap: prompts that stand word for word in the SFT data"""


def _show(name: str, value: Figure) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        mean, *rest = (f"{one:.3g}" for one in value.values())
        return f"{mean} ({', '.join(rest)})"
    if name in _SHARES:
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _example(row: dict[str, Any]) -> str:
    """A row in words: what is asked, and what was answered with its score."""
    asked = plain(row["prompt"]) if isinstance(row["prompt"], str) else _talk(row["prompt"])
    sides = {"chosen": "score_chosen", "rejected": "score_rejected", "completion": "score"}
    answers = [
        f"**{side}** (score {row[score]:.3g})\n\n{_quote(plain(row[side]))}"
        for side, score in sides.items()
        if side in row
    ]
    return "\n\n".join([_quote(asked), *answers])


def _talk(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())
