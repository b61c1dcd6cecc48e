"""Data sets for every stage: one call from a name in a recipe to rows in TRL's formats.

    load_data(args, "train", "messages")   ->  datasets.Dataset | IterableDataset
    data_fingerprint(args, "train")        ->  what is read, by content

A name is a set of the lab (`lab/chat`), a local file, folder or glob, the output_dir of a stage that makes
data, or a Hub id (data_sources.py). All go one way: rows with their places -> one layout per file
(formats.py) -> the rows of the split (data_splits.py) -> an Arrow file in Hugging Face's cache,
memory-mapped, or a stream. A bad row is an error naming file and row; with `skip_bad_rows` it is passed over
and counted by reason in the `DataReport`. Rows whose chosen and rejected answers are equal teach nothing:
they are always left out, and counted.
"""

import difflib
import hashlib
import json
from collections.abc import Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueup.base.data_rows import DataReport, RowReader, cached, stream
from trueup.base.data_sources import SetConfig, SplitPlan, open_source
from trueup.base.formats import FORMS
from trueup.recipes.directory import RECORD, Kind
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Split = Literal["train", "validation", "test"]


@dataclass
class DataArguments:
    """The data keys of every stage, by TRL's names. (`dataset_kwargs` is SFTConfig's, with another
    meaning.)
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local file, folder or glob, or a set of the lab such as lab/chat."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub set, or subfolder of a local one."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Name of the set's own split to train on."}
    )
    dataset_validation_split: str = field(
        default="validation",
        metadata={
            "help": "Name of the set's own validation split; cut from train by prompt hash if it has none."
        },
    )
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Name of the set's own test split; cut from train by prompt hash if it has none."},
    )
    validation_split_size: float = field(
        default=0.05,
        metadata={
            "help": "Share of prompts held out for validation where the set has no such split; 0 for none."
        },
    )
    test_split_size: float = field(
        default=0.05,
        metadata={
            "help": "Share of prompts held out for verdicts where the set has no such split; 0 for none."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read rows as they are needed instead of caching the set on disk first."},
    )
    dataset_text_field: str = field(
        default="text",
        metadata={"help": "Column that holds the text of plain-text sets; handed on as 'text'."},
    )
    dataset_options: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Further arguments of the lab's generator or of datasets.load_dataset."},
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "A mixture in place of dataset_name: sets as path, name, data_dir, data_files, split, "
            "columns, fraction (share of the mixture), weight (share of the set's rows to keep)."
        },
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Pass over bad rows and count them, instead of stopping at them."}
    )


# -------------------------------------------------------------------------------------------------- the calls


def load_data(
    args: DataArguments, split: Split, form: str, reports: list[DataReport] | None = None
) -> "Dataset | IterableDataset":
    """Rows of one split in TRL's `form` (see formats.py); other columns ride along for the scorers.

    One DataReport per set is appended to `reports`. A set on disk is converted once and then opened
    memory-mapped from the cache. A stream stops at the first bad row, a set on disk lists the first few in
    one error.

    Raises UsageError for what the recipe must change (names, splits, sizes), TrueupError for what the data
    must: bad rows, unknown columns, damaged files, no rows.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
    readers, parts = [], []
    for config in _configs(args):
        source = open_source(config, _plan(args, split), args.dataset_streaming)
        reader = RowReader(source, config, split, form, args.dataset_text_field, args.skip_bad_rows)
        parts.append(stream(reader) if args.dataset_streaming else cached(reader))
        readers.append(reader)
        if reports is not None:
            reports.append(reader.report)
    if len(parts) == 1:
        return parts[0]
    _check_mixable(readers)
    from datasets import concatenate_datasets

    return concatenate_datasets(_shares_of_mixture(readers, parts))


def data_fingerprint(args: DataArguments, split: Split) -> dict[str, Any]:
    """What a run reads, for its lineage: {"name", "split", "sha256", ...}; JSON-able, no row is converted.

    Local files count by content and order, not by name, folder or time; a lab set by its generator's
    fingerprint; a Hub set by id, configuration and commit. `shares` are there where splits are cut by hash.
    """
    parts = []
    for config in _configs(args):
        source = open_source(config, _plan(args, split), args.dataset_streaming)
        kept = {
            key: getattr(config, key) for key in ("columns", "fraction", "weight") if getattr(config, key)
        }
        shares = {"shares": source.shares} if source.shares else {}
        parts.append({"name": source.name, "split": split, **source.fingerprint(), **shares, **kept})
    if len(parts) == 1:
        return parts[0]
    sha256 = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {
        "name": " + ".join(part["name"] for part in parts),
        "split": split,
        "sha256": sha256,
        "datasets": parts,
    }


def data_parents(args: Any) -> dict[str, tuple[str, Kind | None]]:
    """A run's parents among its data: recipe key -> data set it names, of those that a stage wrote.

    Args:
        args: a stage's dataclass, built on DataArguments.
    """
    named = {"dataset_name": args.dataset_name}
    named |= {f"datasets[{place}]": entry.get("path") for place, entry in enumerate(args.datasets or [])}
    return {role: (path, "data") for role, path in named.items() if path and (Path(path) / RECORD).exists()}


# ------------------------------------------------------------------------------------------ what is asked for


def _configs(args: DataArguments) -> list[SetConfig]:
    if args.datasets and args.dataset_name:
        raise UsageError("dataset_name and datasets are both set: keep the one that is meant.")
    if args.datasets:
        if args.dataset_config or args.dataset_options:
            raise UsageError("dataset_config and dataset_options go with dataset_name, not with datasets.")
        return [_config(entry, number) for number, entry in enumerate(args.datasets, start=1)]
    if not args.dataset_name:
        raise UsageError(
            "no data: set dataset_name to a Hub id, a file or folder, or a set of the lab (lab/chat)."
        )
    options = dict(args.dataset_options or {})
    files = {key: options.pop(key) for key in ("data_dir", "data_files") if key in options}
    return [SetConfig(args.dataset_name, args.dataset_config, **files, options=tuple(options.items()))]


def _config(entry: dict[str, Any], number: int) -> SetConfig:
    """One entry of `datasets`, TRL's keys; its further keys are options of the lab's generator or of
    load_dataset.
    """
    known = [f.name for f in fields(SetConfig) if f.name != "options"]
    if not isinstance(entry.get("path"), str):
        raise UsageError(f"datasets, entry {number}: it needs a path (Hub id, file, folder or lab/...).")
    options = {key: value for key, value in entry.items() if key not in known}
    for key in options:
        if near := difflib.get_close_matches(key, known, n=1):
            raise UsageError(f"datasets, entry {number}: unknown key '{key}'. Did you mean '{near[0]}'?")
    for key in ("fraction", "weight"):
        if entry.get(key) is not None and not 0 < entry[key] <= 1:
            raise UsageError(f"datasets, entry {number}: {key} is {entry[key]}, not a share between 0 and 1.")
    columns = tuple(entry["columns"]) if entry.get("columns") else None
    rest = {key: entry[key] for key in known if key in entry and key != "columns"}
    return SetConfig(**rest, columns=columns, options=tuple(options.items()))


def _plan(args: DataArguments, split: Split) -> SplitPlan:
    sizes = {"validation": args.validation_split_size, "test": args.test_split_size}
    for part, size in sizes.items():
        if not 0 <= size < 1:
            raise UsageError(f"{part}_split_size is {size}: it is a share of the prompts, such as 0.05.")
    if sum(sizes.values()) >= 1:
        raise UsageError("validation_split_size and test_split_size leave nothing to train on.")
    names = {
        "train": args.dataset_train_split,
        "validation": args.dataset_validation_split,
        "test": args.dataset_test_split,
    }
    return SplitPlan(split, names, sizes)


def _check_mixable(readers: list[RowReader]) -> None:
    """One column has one type: TRL looks at the first row to tell strings from conversations."""
    seen: dict[str, tuple[str, str]] = {}
    for report in (reader.report for reader in readers):
        for column, kind in report.columns.items():
            before, name = seen.setdefault(column, (kind, report.name))
            if kind != before and "null" not in (kind, before):
                raise TrueupError(
                    f"datasets: '{column}' is of type {before} in {name}, but {kind} in {report.name}. "
                    "The sets of a mixture must agree: bring both to one layout, or choose their columns."
                )


def _shares_of_mixture(readers: list[RowReader], parts: list[Any]) -> list[Any]:
    """TRL's `fraction`: target shares of the mixture, which is as large as it can be with no row twice."""
    fractions = [reader.config.fraction for reader in readers]
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return parts
    if len(given) < len(fractions):
        raise UsageError("datasets: fraction must be set for all sets of the mixture or for none.")
    if not isinstance(parts[0], Sized):
        raise UsageError(
            "datasets: fraction needs the sets' sizes: set dataset_streaming: false, or use weight."
        )
    shares = [fraction / sum(given) for fraction in given]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    return [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]
