"""The page on a data set of pairs, from its figures alone: what the stage writes and what the Hub shows."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from trueup.eval.markdown import escape, quote
from trueup.eval.rendering import plain

Figure = int | float | dict[str, float] | None


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
        head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---"
        return f"{head}\n\n# Data card\n\n{self.body()}\n"

    def body(self) -> Markup:
        """How the rows were made, their figures, and a few of them; what they say cannot change the page."""
        made = {**self.made, "sft data": self.sft}
        parts = [
            "\n".join(f"- {name.replace('_', ' ')}: {escape(value)}" for name, value in made.items()),
            "\n".join(self.table()),
            _LEGEND,
            "## Rows picked at random",
            "\n\n---\n\n".join(map(_example, self.examples)),
        ]
        return Markup("\n\n".join(parts))


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
        f"**{side}** (score {row[score]:.3g})\n\n{quote(plain(row[side]))}"
        for side, score in sides.items()
        if side in row
    ]
    return "\n\n".join([quote(asked), *answers])


def _talk(messages: list[dict[str, str]]) -> str:
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
