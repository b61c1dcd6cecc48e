"""Rows of local files, each with its place, and the files behind a name.

`find_files` turns a file, folder or glob into paths, `read_rows` a path into rows: (line or row number, row),
where a row that cannot be read is a `BadRow` in the row's stead, so that the caller decides between raising
and skipping. Nothing is held in memory but the current row (a `.json` list excepted: JSON can only be read
whole).
"""

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trueup.base.formats import BadRow, Row, kind_of
from trueup.recipes.errors import TrueupError, UsageError, nearest_path

# Where GPT-2's corpora and their kin (TinyStories.txt, ...) mark the end of a document in plain text.
DOCUMENT_END = "<|endoftext|>"
# A longer document is read in pieces of this many bytes, ended at a line, so that a 100 GB text file streams
# too.
PIECE = 4_000_000

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

Numbered = Iterator[tuple[int, Row | BadRow]]


def find_files(name: str) -> list[Path]:
    """The data files behind a file name, folder or glob, sorted; of a folder all that `is_data`.

    Raises UsageError where there is none, with the nearest existing name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        kind_of_file(path)  # an unknown kind named outright is an error; in a folder it is passed over
        return [path]
    if path.is_dir():
        inside = [
            file for file in sorted(path.rglob("*")) if file.is_file() and is_data(file.relative_to(path))
        ]
        if not inside:
            raise UsageError(f"{name}: no data file in this folder. Known kinds: {_known()}.")
        return inside
    if glob.has_magic(name):
        matches = [
            Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()
        ]
        if not matches:
            raise UsageError(f"{name}: no file matches this pattern.")
        return [match for match in matches if kind_of_file(match)]
    raise UsageError(f"{name}: no such file or folder{nearest_path(path)}")


def is_data(path: Path) -> bool:
    """Whether a file found in a folder (path relative to it) is data: a known kind, not hidden, not its
    README.
    """
    hidden = any(part.startswith(".") for part in path.parts)
    return (
        not hidden
        and _suffix(path) in READERS
        and path.name.split(".")[0].upper() not in ("README", "LICENSE")
    )


def kind_of_file(path: Path) -> str:
    """`.jsonl` for `a.jsonl.gz`; UsageError for a kind no reader is known for."""
    suffix = _suffix(path)
    if suffix not in READERS:
        raise UsageError(f"{path}: unknown kind of file '{path.suffix}'. Known kinds: {_known()}.")
    return suffix


def has_known_suffix(name: str) -> bool:
    return _suffix(Path(name)) in READERS


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix.lower()


def _known() -> str:
    return f"{', '.join(READERS)}, each also {' or '.join(COMPRESSIONS)}"


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: Path, notes: list[str]) -> Numbered:
    """The rows of one file, numbered by line where the file has lines, else by row, from 1.

    What is harmless but changed (a byte order mark, CRLF) is said in `notes`. A damaged or unreadable file
    raises TrueupError, bad rows skipped or not: how much it lost cannot be counted.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, row in READERS[kind_of_file(path)](file, notes):
                yield number, row
    except OSError as error:
        if error.errno:  # the system's own: no permission, I/O error
            raise TrueupError(f"{path}: cannot be read: {error.strerror}.") from error
        raise TrueupError(
            f"{path}: damaged after row {number}: {error}. Fetch or write the file again."
        ) from error


def _open(path: Path) -> IO[bytes]:
    """Bytes of a file, decompressed. By Arrow, which unlike `zstandard` notices that a stream is cut off."""
    import pyarrow as pa  # type: ignore[import-untyped]

    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        return path.open("rb")
    # GzipFile-like objects of two members and several zstd frames are read through to the end.
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), buffer_size=1 << 20)


def _lines(file: IO[bytes], notes: list[str]) -> Iterator[tuple[int, str, str]]:
    """(line number, line, what is wrong with its bytes or ""): undecodable bytes come as surrogates."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        fault = ""
        if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
            notes.append("a byte order mark at the start was passed over")
            offset, raw = 3, raw[3:]
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.decode("utf-8", errors="surrogateescape")
            fault = f"byte {offset + error.start} is 0x{raw[error.start]:02x}"
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                fault += "; this is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"
        offset += len(raw)
        yield number, line, fault


def _not_utf8(fault: str) -> BadRow:
    return BadRow("not UTF-8", fault)


def _read_text(file: IO[bytes], notes: list[str]) -> Numbered:
    """One document per file, or what stands between `<|endoftext|>` marks. CRLF becomes LF."""
    start, parts, size, fault, found = 1, list[str](), 0, "", False

    def document() -> Numbered:
        text = "".join(parts)
        if fault:
            yield start, _not_utf8(fault)
        elif text.strip():
            yield start, {"text": text}

    for number, line, wrong in _lines(file, notes):
        if line.endswith("\r\n"):
            line = line[:-2] + "\n"
            if not any("CRLF" in note for note in notes):
                notes.append("CRLF line ends became LF")
        first, *rest = line.split(DOCUMENT_END)
        fault = fault or wrong
        parts.append(first)
        size += len(first)
        for piece in rest or ([""] if size >= PIECE else []):
            for item in document():
                found = True
                yield item
            start, parts, size, fault = number, [piece.lstrip("\n")], len(piece), ""
    for item in document():
        found = True
        yield item
    if not found:
        yield 1, BadRow("the file is empty")


def _read_jsonl(file: IO[bytes], notes: list[str]) -> Numbered:
    for number, line, fault in _lines(file, notes):
        if fault:
            yield number, _not_utf8(fault)
        elif line.strip():
            yield number, _object(line)


def _object(line: str) -> Row | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error).replace(": line 1 column", ": column"))
    return _checked(row, escaped="\\u" in line)


def _checked(row: Any, escaped: bool) -> Row | BadRow:
    """An object of whole characters: an escape can name half a surrogate pair, which no encoder takes."""
    if not isinstance(row, dict):
        return BadRow("not a JSON object", f"it is a {kind_of(row)}")
    if not escaped:
        return row
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(
            "half a character", f"a lone surrogate {error.object[error.start]!r} is not Unicode text"
        )
    return row


def _read_json(file: IO[bytes], notes: list[str]) -> Numbered:
    """A list of objects, numbered by row; many files named .json hold JSON lines, and are read as such."""
    content = file.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_jsonl(io.BytesIO(content), notes)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield (
            content[: error.start].count(b"\n") + 1,
            _not_utf8(f"byte {error.start} is 0x{content[error.start]:02x}"),
        )
    except json.JSONDecodeError as error:
        yield error.lineno, BadRow("not JSON", str(error))
    else:
        for number, row in enumerate(rows, start=1):
            yield number, _checked(row, escaped=True)


def _read_csv(file: IO[bytes], notes: list[str]) -> Numbered:
    """The first line names the columns; every value is a string."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB refuses a long document
    faults: list[str] = []

    def lines() -> Iterator[str]:
        for _, line, fault in _lines(file, notes):
            if fault:
                faults.append(fault)
            yield line

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise OSError(f"its header is not CSV: {error}") from error
    if faults:
        raise OSError(f"its header is not UTF-8: {faults[0]}")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRow("not CSV", str(error))
            continue
        if faults:
            yield number, _not_utf8(faults[0])
            faults.clear()
        elif len(cells) != len(header):
            if cells:
                yield (
                    number,
                    BadRow("not as many cells as columns", f"{len(cells)} cells, {len(header)} columns"),
                )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _read_parquet(file: IO[bytes], notes: list[str]) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    # Parquet is read from its end: a compressed one has to be unpacked first.
    source = file if file.seekable() else io.BytesIO(file.read())
    number = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise OSError(str(error).rstrip(".")) from error


READERS: dict[str, Callable[[IO[bytes], list[str]], Numbered]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
