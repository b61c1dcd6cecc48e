"""Pairs that teach nothing, counted and left out: for every stage that reads pairs.

    rows, report = clean_pairs(rows, tokenizer, max_length, "train")
    print(*report.lines(), sep="\\n")

`load_data` has seen to whole rows and their layout; here it is told what only the tokens can tell.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from trueup.eval.rendering import encode_pair, encode_prompt, plain
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Rows = TypeVar("Rows", "Dataset", "IterableDataset")
Fault = Literal["identical", "empty", "truncated"]


@dataclass
class CleanReport:
    """How many pairs were kept, and how many left out for which reason. Of a stream it grows as it is read.

    Args:
        name: of the rows, for the lines: `train`.
        max_length: tokens a trainer keeps of a prompt and its answer; None: all.
        identical: chosen and rejected are the same text.
        empty: chosen or rejected has no words.
        truncated: within `max_length` nothing is left of an answer, or the two are equal.
    """

    name: str
    max_length: int | None
    kept: int = 0
    identical: int = 0
    empty: int = 0
    truncated: int = 0

    @property
    def dropped(self) -> int:
        return self.identical + self.empty + self.truncated

    def lines(self) -> list[str]:
        """A line per reason for pairs left out; none if all were kept."""
        reasons = {
            "chosen and rejected are equal": self.identical,
            "an answer is empty": self.empty,
            f"within max_length {self.max_length} an answer is cut away, or both are equal": self.truncated,
        }
        return [
            f"{self.name}: left out {count:,} of {self.kept + self.dropped:,} pairs: {reason}"
            for reason, count in reasons.items()
            if count
        ]


def clean_pairs(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", max_length: int | None, name: str
) -> tuple[Rows, CleanReport]:
    """The pairs that can teach something, and how many could not.

    Args:
        rows: `prompt`, `chosen`, `rejected`, as load_data(..., "preference") gives them.
        max_length: where the trainer cuts prompt + answer (TRL's key; from the end); None: it does not.
        name: of the rows, for messages.

    Raises:
        TrueupError: no pair is left (of a stream that is not known).
    """
    from datasets import Dataset

    report: CleanReport = CleanReport(name, max_length)
    usable = partial(_usable, tokenizer=tokenizer, report=report)
    if not isinstance(rows, Dataset):
        return rows.filter(usable), report
    kept = [place for place, row in enumerate(rows) if usable(cast("dict[str, Any]", row))]
    if not kept:
        raise TrueupError("\n".join([f"{name}: no pair is left to learn from", *report.lines()]))
    return (rows if len(kept) == len(rows) else rows.select(kept)), report


def _usable(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", report: CleanReport) -> bool:
    counter = fault(row, tokenizer, report.max_length) or "kept"
    setattr(report, counter, getattr(report, counter) + 1)
    return counter == "kept"


def fault(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> Fault | None:
    """What is wrong with a pair; None if nothing. Its tokens are those that TRL's trainers make."""
    chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
    if not chosen.strip() or not rejected.strip():
        return "empty"
    if row["chosen"] == row["rejected"]:
        return "identical"
    if max_length is None:
        return None
    sides = [encode_pair(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
    if sides[0] == sides[1]:  # a template may strip what made the texts differ
        return "identical"
    if max(map(len, sides)) <= max_length:
        return None
    prompt = encode_prompt(tokenizer, row["prompt"])
    start = min(_common_length(prompt, side) for side in sides)
    gone = min(map(len, sides)) <= start or start >= max_length
    return "truncated" if gone or sides[0][:max_length] == sides[1][:max_length] else None


def _common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
