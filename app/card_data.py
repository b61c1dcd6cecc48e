"""The card of a data set: a directory of pairs that a stage wrote, or any file of rows."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.app.card_public import public
from trueup.app.card_subject import Files, Subject, making, public_family
from trueup.eval.markdown import environment
from trueup.recipes.directory import ModelDirectory, open_directory, read_json
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

Json = dict[str, Any]

TEMPLATE = "card_data.md.jinja"
SPLITS = ("train", "validation", "test")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# What columns mean, where trueup or TRL named them.
COLUMNS = {
    "prompt": "what is asked: text, or messages",
    "chosen": "the better answer, by the label",
    "rejected": "the worse answer, by the label",
    "completion": "the answer",
    "label": "whether the answer is good",
    "messages": "a conversation",
    "text": "a text",
    "score": "the scorer's score of the answer",
    "score_chosen": "the scorer's score of the chosen answer",
    "score_rejected": "the scorer's score of the rejected answer; it is the higher one where the label errs",
    "p_label": "the probability with which the labeller labels so",
    "model_chosen": "which model gave the chosen answer",
    "model_rejected": "which model gave the rejected answer",
    "vote": "the vote this row comes from",
}


@dataclass(frozen=True)
class RowFile:
    """One file of rows.

    Args:
        first: its first row; empty if it has none.
    """

    name: str
    split: str
    rows: int
    sha256: str
    first: Json


@dataclass(frozen=True)
class DataSubject(Subject):
    """A data set; of a file, `model.path` is the file."""

    files: list[RowFile]

    @cached_property
    def columns(self) -> dict[str, str]:
        """Column -> its type, as the first rows have it."""
        return {name: _type(value) for one in self.files for name, value in one.first.items()}

    @property
    def rows(self) -> int:
        """Of all splits."""
        return sum(one.rows for one in self.files)

    @property
    def splits(self) -> dict[str, list[str]]:
        """Split -> its files."""
        names = dict.fromkeys(one.split for one in self.files)
        return {split: [one.name for one in self.files if one.split == split] for split in names}

    @property
    def form(self) -> str:
        """What its rows are, in words."""
        if {"chosen", "rejected"} <= self.columns.keys():
            return "preference pairs"
        return "prompts with an answer" if "completion" in self.columns else "rows"


def data_card(path: Path, repo_id: str | None, license: str | None) -> tuple["DatasetCardData", str, Files]:
    """Metadata, page and pictures.

    Raises:
        UsageError: it holds no rows.
        TrueupError: a row is not JSON, or the directory was changed after it was written.
    """
    if path.is_dir():
        opened, names = open_directory(path, "data"), sorted(path.glob("*.jsonl"))
    else:
        opened, names = ModelDirectory(path, _sha256(path), {}), [path]
    files = sorted((_read(one) for one in names), key=lambda one: (*SPLITS, one.split).index(one.split))
    model, nodes = public_family(opened)
    subject = DataSubject(model, nodes, repo_id, license, files)
    if not subject.rows:
        raise UsageError(f"{path}: holds no rows")
    pictures: Files = {}
    page = (
        environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            **making(subject, pictures),
            meanings=COLUMNS,
            body=_body(path),
            load=_load(subject),
            limits=list(_limits(subject)),
        )
    )
    return _metadata(subject), page, pictures


def _read(path: Path) -> RowFile:
    split = path.stem if path.stem in SPLITS else SPLITS[0]
    first: Json = {}
    count = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            count += 1
            if count == 1:
                try:
                    first = json.loads(line)
                except ValueError as error:
                    raise TrueupError(f"{path}:{number}: not JSON; a row is a JSON object a line") from error
                if not isinstance(first, dict):
                    raise TrueupError(f"{path}:{number}: not a JSON object; a row is one a line")
    return RowFile(path.name, split, count, _sha256(path), first)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _type(value: Any) -> str:
    if isinstance(value, list):
        messages = value and isinstance(value[0], dict) and {"role", "content"} <= value[0].keys()
        return "messages" if messages else "list"
    names = {bool: "true or false", int: "number", float: "number", str: "text", dict: "object"}
    return names.get(type(value), "empty in the first row")


def _body(path: Path) -> str:
    """How it was made, from the card that the pairs stage wrote; empty for other data."""
    from trueup.preference.pairs_page import Card

    written = path / "card.json"
    if path.is_file() or not written.exists():
        return ""
    found = read_json(written)
    made = public({"made": found["made"], "sft": found["sft_data"]}, path.absolute().parent)
    return Card(splits=found["splits"], examples=found["examples"], **made).body()


def _load(subject: DataSubject) -> str:
    name = json.dumps(subject.address)
    if not subject.repo_id and subject.model.path.suffix == ".jsonl":
        opened = f'load_dataset("json", data_files={name})'
    else:
        opened = f"load_dataset({name})"
    first = json.dumps(subject.files[0].split)
    return f"from datasets import load_dataset\nrows = {opened}\nprint(rows[{first}][0])"


def _limits(subject: DataSubject) -> Iterator[str]:
    if not subject.record:
        yield "How it was made is not recorded: who wrote the answers and who labelled them is unknown."
    if subject.stage == "pairs":
        recipe = subject.record["recipe"]
        scorers = ", ".join(map(str, recipe.get("reward_funcs") or [])) or "its scorer"
        yield "The answers are a model's, not people's; so are their errors."
        yield f"What is better was decided by {scorers}, and is no better than that."
        if recipe.get("label_temperature") is not None or recipe.get("label_flip"):
            yield "Labels err on purpose, as stated above: p_label holds by how much."
        yield f"Drawn once, with seed {subject.record['seeds']['seed']}."
    if any(str(one["name"]).startswith("lab/") for node in subject.nodes.values()
           for one in node.record.get("data", [])):  # fmt: skip
        yield "It speaks of the lab's world, which a program invented: none of it is true of anything else."
    yield "Not checked: personal data, offensive text, and overlap with benchmarks."


def _metadata(subject: DataSubject) -> "DatasetCardData":
    from huggingface_hub import DatasetCardData

    sampled = subject.stage == "pairs"
    preference = ["preference"] if subject.form == "preference pairs" else []
    return DatasetCardData(
        pretty_name=subject.name,
        license=subject.license,
        annotations_creators=["machine-generated"] if sampled else None,
        language_creators=["machine-generated"] if sampled else None,
        size_categories=next((name for most, name in SIZES if subject.rows < most), "1M<n<10M"),
        task_categories=["text-generation"],
        tags=["trueup", "trl", *preference],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": names[0] if len(names) == 1 else names}
                    for split, names in subject.splits.items()
                ],
            }
        ],
    )
