"""From a source to the rows of one split in one form, every row either kept or accounted for.

`RowReader.rows` is the one path all data takes; `stream` and `cached` are the two ways to hand it on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.base import formats
from trueup.base.data_files import Numbered
from trueup.base.data_sources import SetConfig, Source
from trueup.base.data_splits import prompt_key, split_of, split_text, unit_hash
from trueup.base.formats import LAYOUTS, TRL_COLUMNS, BadRow, Layout, Row, convert, recognise
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

SHOWN = 5  # bad rows listed in one error: enough to see a pattern
HEAD = 20  # rows looked at for a file's columns, so that one row without a field does not decide its layout
BATCH = 1000  # rows written at once, and at most so many characters
BATCH_CHARACTERS = 32_000_000


@dataclass
class DataReport:
    """What became of one set's rows. Of a stream the counts grow as rows are read, over all passes."""

    name: str
    split: str
    form: str
    read: int = 0
    rows: int = 0
    layouts: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, place: str) -> None:
        count, first = self.skipped.get(reason, (0, place))
        self.skipped[reason] = (count + 1, first)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def lines(self) -> list[str]:
        """One line for the whole, the sizes of the splits, a line per reason for rows left out, notes."""
        layouts = ", ".join(self.layouts) or "nothing yet"
        lines = [
            f"{self.name} [{self.split}]: {self.rows:,} rows as {self.form} from {self.read:,} ({layouts})"
        ]
        if len(self.splits) > 1:
            sizes = [
                f"{name} {self.splits[name]:,}"
                for name in ("train", "validation", "test")
                if name in self.splits
            ]
            lines.append(f"  split by prompt hash: {', '.join(sizes)}")
        for reason, (count, place) in self.skipped.items():
            lines.append(f"  left out: {count:,} x {reason} (first: {place})")
        return lines + [f"  note: {text}" for text in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass
class Columns:
    """The type of each column so far: what the rows of a set must agree on, and what Arrow is told."""

    kinds: dict[str, str] = field(default_factory=dict)

    def observe(self, row: Row) -> None:
        """Takes a row's types in. A scorer's column may change its type and becomes JSON; TRL's may not."""
        for name, value in row.items():
            kind, before = _kind(name, value), self.kinds.get(name, "null")
            if before == "null":
                self.kinds[name] = kind
            elif kind in (before, "null"):
                continue
            elif name in TRL_COLUMNS:
                raise BadRow(f"'{name}' is of type {kind} here, but {before} in the rows before")
            else:
                self.kinds[name] = "number" if {kind, before} == {"integer", "number"} else "JSON"

    def features(self) -> "Features":
        from datasets import Features, Json, List, Value

        types = {
            "conversation": List({"role": Value("string"), "content": Value("string")}),
            "boolean": Value("bool"),
            "integer": Value("int64"),
            "number": Value("float64"),
            "JSON": Json(),
        }
        return Features({name: types.get(kind, Value("string")) for name, kind in self.kinds.items()})

    def encode(self, row: Row) -> Row:
        """A row as Arrow takes it. JSON is written here: `datasets.Json` would read "1" back as 1."""
        encoded = {name: row.get(name) for name in self.kinds}
        for name, kind in self.kinds.items():
            if kind == "JSON" and encoded[name] is not None:
                encoded[name] = json.dumps(encoded[name], default=str)
        return encoded


def _kind(name: str, value: Any) -> str:
    if isinstance(value, list) and name in TRL_COLUMNS:
        return "conversation"
    if type(value) is int and -(2**63) <= value < 2**63:
        return "integer"
    names = {type(None): "null", str: "string", bool: "boolean", float: "number"}
    return names.get(type(value), "JSON")


@dataclass
class RowReader:
    """One set, one split, one form: reads, converts, sorts into splits and counts."""

    source: Source
    config: SetConfig
    split: str
    form: str
    text_field: str
    skip_bad_rows: bool
    patience: int = SHOWN
    report: DataReport = field(init=False)
    columns: Columns = field(init=False)

    def __post_init__(self) -> None:
        self.report = DataReport(self.source.name, self.split, self.form, notes=list(self.source.notes))
        self.columns = Columns()

    def rows(self, shards: list[str]) -> Iterator[Row]:
        """The split's rows. Bad ones are raised together: once there are `patience`, or at the end."""
        faults: list[str] = []
        for shard in shards:
            for place, found in self._converted(shard):
                self.report.read += 1
                try:
                    kept = self._of_split(found)
                except BadRow as bad:
                    self.report.skip(bad.reason, place)
                    if not (self.skip_bad_rows or bad.harmless):
                        faults.append(f"  {place}: {bad}")
                    if len(faults) == self.patience:
                        raise self._refusal(faults) from None
                    continue
                self.report.rows += len(kept)
                yield from kept
        if faults:
            raise self._refusal(faults)

    def _refusal(self, faults: list[str]) -> TrueupError:
        return TrueupError(
            "\n".join([f"{self.source.name}: bad rows (at most {self.patience} are listed):", *faults])
            + "\nMend them, or set skip_bad_rows: true to pass over such rows and have them counted."
        )

    def _converted(self, shard: str) -> Iterator[tuple[str, list[Row] | BadRow]]:
        """Each row of a shard with its place, converted to the form, or what is wrong with it."""
        notes: list[str] = []
        numbered = self.source.read(shard, notes)
        head, layout = self._head(shard, numbered)
        for number, row in chain(head, numbered):
            found: list[Row] | BadRow
            try:
                found = row if isinstance(row, BadRow) else convert(self._named(row), layout, self.form)
            except BadRow as bad:
                found = bad
            else:
                self.report.layouts[layout.name] = self.report.layouts.get(layout.name, 0) + 1
            yield self.source.place(shard, number), found
        for note in notes or ([] if head else ["it holds no rows"]):
            self.report.note(f"{shard}: {note}")

    def _head(self, shard: str, numbered: Numbered) -> tuple[list[tuple[int, Row | BadRow]], Layout]:
        """A shard's first rows, and its layout from all the columns they have together."""
        head, columns, good = list[tuple[int, Row | BadRow]](), dict[str, None](), 0
        for number, row in numbered:
            head.append((number, row))
            if isinstance(row, dict):
                good += 1
                columns |= dict.fromkeys(row)
            if good == HEAD:
                break
        if not good:  # no row, or only bad ones, which are reported as they are: no layout is needed
            return head, LAYOUTS[-1]
        if missing := set(self.config.columns or ()) - columns.keys():
            raise UsageError(f"{shard}: no column {', '.join(sorted(missing))}; it has {', '.join(columns)}.")
        layout = recognise(self._named(dict(columns)), self.form, shard)
        if layout.kind == "preference" and self.form in ("messages", "prompt_completion"):
            self.report.note(f"{shard}: the chosen answers are the examples, the rejected ones are not used")
        elif unused := TRL_COLUMNS & columns.keys() - {*layout.columns, *layout.optional}:
            self.report.note(f"{shard}: columns not used for {self.form}: {', '.join(sorted(unused))}")
        return head, layout

    def _named(self, row: Row) -> Row:
        """The row with only the columns asked for, and its text under TRL's name."""
        if self.config.columns:
            row = {name: row[name] for name in self.config.columns if name in row}
        if self.form == "text" and self.text_field in row and self.text_field != "text":
            row = {name: value for name, value in row.items() if name != "text"}
            row = {"text": row.pop(self.text_field)} | row
        return row

    def _of_split(self, found: list[Row] | BadRow) -> list[Row]:
        """What of these rows is in the split asked for; the others are counted."""
        if isinstance(found, BadRow):
            raise found
        kept = []
        for split, row in chain.from_iterable(map(self._placed, found)):
            if split == self.split:
                self.columns.observe(row)
                kept.append(row)
            self.report.splits[split] = self.report.splits.get(split, 0) + 1
        return kept

    def _placed(self, row: Row) -> Iterator[tuple[str, Row]]:
        """(split, row): several for a long text, none for a row that `weight` leaves out."""
        prompt = row["text"] if self.form == "text" else row.get("prompt", row.get("messages"))
        # Salted, or the rows kept would be those of one split.
        if self.config.weight and unit_hash(prompt_key(prompt), salt="weight:") >= self.config.weight:
            return
        shares = self.source.shares
        if shares is None:
            yield self.split, row
        elif self.form == "text":
            for split, text in split_text(row["text"], **shares):
                yield split, row | {"text": text}
        else:
            yield split_of(prompt, **shares), row

    def no_rows(self) -> TrueupError:
        """Why the split is empty, from the counts."""
        report = self.report
        if report.splits:
            sizes = ", ".join(f"{count:,} in {name}" for name, count in report.splits.items())
            reason = f"its rows are, by prompt hash, {sizes}: too few for every split to get some."
            fix = f"Raise {self.split}_split_size, or give the set a file of its own for this split."
        elif report.skipped:
            counts = ", ".join(f"{count:,} x {reason}" for reason, (count, _) in report.skipped.items())
            reason, fix = f"all {report.read:,} rows were left out: {counts}.", "Mend the data."
        else:
            reason, fix = "it holds no rows.", "Check that it was written to the end."
        return TrueupError(f"{report.name}: nothing for split {self.split}: {reason} {fix}")


# ------------------------------------------------------------------------------------ as a stream, or on disk


def stream(reader: RowReader) -> "IterableDataset":
    """Rows as they are needed. The first is read at once: what is wrong with the whole set shows early."""
    from datasets import IterableDataset

    reader.patience = 1
    first = replace(reader)
    if next(first.rows(reader.source.shards()), None) is None:
        raise first.no_rows()
    reader.report.columns = first.columns.kinds
    return IterableDataset.from_generator(reader.rows, gen_kwargs={"shards": reader.source.shards()})


def cached(reader: RowReader) -> "Dataset":
    """Rows on disk, memory-mapped; converted now if the cache lacks them, by one of several processes."""
    from datasets import Dataset, config
    from filelock import FileLock

    folder = Path(config.HF_DATASETS_CACHE) / "trueup" / _key(reader)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(reader, folder)
    except OSError as error:
        raise TrueupError(
            f"{reader.source.name}: the cache {folder.parent} cannot be written: {error.strerror or error}. "
            "Free space or permit it, or name another place with HF_DATASETS_CACHE."
        ) from error
    dataset = Dataset.from_file(str(folder / "rows.arrow"))
    reader.report = DataReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return dataset


def _key(reader: RowReader) -> str:
    """Names all that cached rows depend on: content, places (the report has them), settings, this code."""
    parts = [
        reader.source.fingerprint(),
        reader.source.shards(),
        reader.source.shares,
        reader.source.notes,
        repr(reader.config),
        [reader.split, reader.form, reader.text_field, reader.skip_bad_rows],
        _code(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache
def _code() -> str:
    """Digest of the code that makes rows, so that what an older version converted is not found."""
    files = [*sorted(Path(__file__).parent.glob("data*.py")), Path(formats.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _build(reader: RowReader, folder: Path) -> None:
    """Writes rows and report beside `folder`, then renames: a cache that exists is complete."""
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed; the lock is ours
    draft.mkdir()
    try:
        arrow = draft / "rows.arrow"
        done, complete = _write(replace(reader), arrow, None)
        if not complete:
            # A column came or changed its type after the first batch: again, now that all are known.
            done, _ = _write(replace(reader), arrow, done.columns)
        done.report.columns = done.columns.kinds
        (draft / "report.json").write_text(json.dumps(asdict(done.report)), encoding="utf-8")
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(reader: RowReader, path: Path, columns: Columns | None) -> tuple[RowReader, bool]:
    """Writes the rows with these columns, or the first batch's; the flag says that those were all.

    Where a later row shows that they were not, the rest is read (columns, bad rows) but not written.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets.utils import tqdm

    rows = reader.rows(reader.source.shards())
    # disable=None: not where the output is no terminal.
    batches = _batches(tqdm(rows, desc=f"Reading {reader.source.name}", unit=" rows", delay=1, disable=None))
    first = next(batches, None)
    if first is None:
        raise reader.no_rows()
    known = columns or Columns(dict(reader.columns.kinds))
    schema = known.features().arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in chain([first], batches):
            if columns or reader.columns == known:
                writer.write_table(pa.Table.from_pylist([known.encode(row) for row in batch], schema))
    return reader, reader.columns == known


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Batches of BATCH rows, or fewer where they hold long texts: a thousand books are too much memory."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
