"""Model directories: what every stage writes and the next one starts from.

A directory is a full Hugging Face checkpoint with `trueup.json` beside it, and is written atomically: it is
either whole or not there. It is named by its *identity*, a hash of weights, config, tokenizer and chat
template, so a copy, a re-evaluation or a resumed run has the same name, and a changed weight another.

A stage that makes data writes a directory of `*.jsonl` files instead, named by the hash of those; a
comparison one with a verdict, named by that and the samples it rests on.
"""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import local_directory, public_name

RECORD = "trueup.json"
VERDICT = "verdict.json"
FORMAT = 1

# Keys that change without the model changing: who saved it, from where, with which version.
_VOLATILE_CONFIG = {"transformers_version", "_name_or_path", "name_or_path", "auto_map", "use_cache"}

Kind = Literal["causal-lm", "reward", "data", "comparison"]
_ARCHITECTURES: dict[Kind, str] = {
    "causal-lm": "ForCausalLM",
    "reward": "ForSequenceClassification",
    "data": "DataSet",  # no architecture: what a directory of rows is called here
    "comparison": "Comparison",
}
_KIND_WORDS: dict[Kind, str] = {
    "causal-lm": "a language model",
    "reward": "a reward model (a sequence classifier)",
    "data": "a data set",
    "comparison": "a comparison",
}


# ---------------------------------------------------------------- identity


def identity(directory: Path) -> str:
    """The content hash (sha256, hex) of a model directory, or of a data set's.

    Tensors are hashed by name, dtype, shape and bytes, so sharding does not matter; JSON files by their
    content less the keys that only tell who saved them; `tokenizer.json` and the chat template whole. Of a
    data set its `*.jsonl` files count, by name and bytes, of a comparison the verdict and the samples.

    Raises:
        TrueupError: weights are missing or a file is cut short.
    """
    digest = hashlib.sha256()
    if not holds_model(directory):
        comparison = [directory / VERDICT, *sorted((directory / "samples").glob("*.jsonl"))]
        for path in comparison if is_comparison(directory) else sorted(directory.glob("*.jsonl")):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        return digest.hexdigest()
    for name in ("config.json", "tokenizer_config.json"):
        digest.update(f"{name}\0{_canonical_json(directory / name)}\0".encode())
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = directory / name
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes() if path.exists() else b"")
    for name, dtype, shape, data in sorted(_tensors(directory), key=lambda tensor: tensor[0]):
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def parameter_count(directory: Path) -> int:
    """Numbers in the weights of a model directory; a tied matrix is stored, and counts, once.

    Raises:
        TrueupError: weights are missing or a file is cut short.
    """
    return sum(math.prod(shape) for _, _, shape, _ in _tensors(directory))


def holds_model(directory: Path) -> bool:
    """Whether a directory is neither a data set nor a comparison."""
    return not (is_data_set(directory) or is_comparison(directory))


def is_data_set(directory: Path) -> bool:
    """Whether a directory holds rows and no model."""
    return not (directory / "config.json").exists() and any(directory.glob("*.jsonl"))


def is_comparison(directory: Path) -> bool:
    """Whether a directory holds a verdict on models."""
    return (directory / VERDICT).exists()


def _canonical_json(path: Path) -> str:
    if not path.exists():
        return ""
    content = read_json(path)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in _VOLATILE_CONFIG}
    return json.dumps(content, sort_keys=True)


def _tensors(directory: Path) -> list[tuple[str, str, list[int], memoryview]]:
    """(name, dtype, shape, bytes) of every tensor, memory-mapped from the directory's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise TrueupError(f"{directory}: holds no *.safetensors weights; the directory is incomplete")
    return [tensor for path in files for tensor in _read_safetensors(path)]


def _read_safetensors(path: Path) -> Iterator[tuple[str, str, list[int], memoryview]]:
    """Format: 8 bytes header length, JSON header, data (https://github.com/huggingface/safetensors)."""
    cut = TrueupError(f"{path}: the file is cut short or not safetensors; write or copy the directory again")
    with path.open("rb") as file:
        try:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            start = 8 + int.from_bytes(view[:8], "little")
            header = json.loads(bytes(view[8:start]))
        except ValueError as error:
            raise cut from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if start + end > len(view):
            raise cut
        yield name, entry["dtype"], entry["shape"], view[start + begin : start + end]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory that was checked: its path, identity and record (empty for a foreign one)."""

    path: Path
    identity: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """How people call it: its path, or the Hub id and commit that it is a snapshot of."""
        return public_name(self.path)

    @property
    def lineage(self) -> dict[str, Any]:
        """What a child keeps of it: enough to print the tree when this directory is gone."""
        return {
            "path": self.name,
            "identity": self.identity,
            "stage": self.record.get("stage", "foreign"),
            "parents": self.record.get("parents", {}),
        }


def open_directory(path: Path | str, kind: Kind | None = None, place: str = "") -> ModelDirectory:
    """Check that a directory is a whole, unchanged model, or data set, of the wanted kind.

    Args:
        path: the directory; or a Hub id, which is downloaded if it is not in the Hub's cache.
        kind: what the caller needs; None takes any.
        place: where the path was written (`recipe.yaml:3: model_name_or_path`), for the message.

    Raises:
        UsageError: there is no such directory, or it holds another kind of model.
        TrueupError: it is half-written, damaged, or was changed after it was written.
    """
    path = Path(local_directory(path, place))
    at = f"{place}: " if place else ""
    if not path.is_dir():
        raise UsageError(f"{at}{path}: no such model directory; run the stage that writes it first")
    if not (path / "config.json").exists() and holds_model(path):
        raise TrueupError(f"{at}{path}: not a model directory, or half-written: config.json is missing")
    _check_kind(path, kind, at)
    record = read_json(path / RECORD) if (path / RECORD).exists() else {}
    try:
        found = identity(path)
    except TrueupError as error:
        raise TrueupError(f"{at}{error}") from error
    if record and record.get("identity") != found:
        raise TrueupError(
            f"{at}{path}: changed after it was written: {RECORD} says {record.get('identity', '?')[:12]}, "
            f"the files are {found[:12]}; restore it, or delete {RECORD} to use it as a foreign model"
        )
    return ModelDirectory(path, found, record)


def _check_kind(path: Path, kind: Kind | None, at: str) -> None:
    if holds_model(path):
        names = read_json(path / "config.json").get("architectures") or []
    else:
        names = ["Comparison"] if is_comparison(path) else ["DataSet"]
    # A model that does not say what it is may be the right one.
    unknown = not names and kind in ("causal-lm", "reward")
    if kind and not unknown and not any(name.endswith(_ARCHITECTURES[kind]) for name in names):
        raise UsageError(
            f"{at}{path}: is {_kind_words(names[0]) if names else 'a model'}, and this needs "
            f"{_KIND_WORDS[kind]}; name the output_dir of the right stage"
        )


def _kind_words(architecture: str) -> str:
    for kind, suffix in _ARCHITECTURES.items():
        if architecture.endswith(suffix):
            return _KIND_WORDS[kind]
    return architecture


def short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> its last part, or as many of them as it takes to tell it from the others."""
    parts = {path: path.parts for path in paths}
    counts = Counter(mine[-count:] for mine in parts.values() for count in range(1, len(mine) + 1))
    return {
        path: "/".join(next((mine[-n:] for n in range(1, len(mine)) if counts[mine[-n:]] == 1), [str(path)]))
        for path, mine in parts.items()
    }


def read_json(path: Path) -> Any:
    """A JSON file. Raises TrueupError naming file and line if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TrueupError(f"{path}:{error.lineno}: not JSON ({error.msg}); the file is damaged") from error
    except UnicodeDecodeError as error:
        raise TrueupError(f"{path}: not UTF-8 text; the file is damaged") from error


# ---------------------------------------------------------------- writing


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    with writing(path), atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends well, and vanishes when not."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling directory that becomes `target` when the block ends well.

    What `target` held before is kept as `<target>.previous`, one generation, so that nothing is lost by a
    recipe that was run again with another setting.
    """
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    previous = target.with_name(f"{target.name}.previous")
    with writing(target):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            for path in [*staging.rglob("*"), staging]:
                if path.is_file():  # safetensors writes for the owner alone; what is published is as usual
                    path.chmod(0o666 & ~_umask())
                _sync(path)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(target, previous)
            os.replace(staging, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one message that names the place.

    Libraries do not all pass the OSError on (safetensors and torch raise errors of their own), so a failure
    while the disk has no room left counts as a full disk too.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        if type(error).__name__ in ("SafetensorError", "RuntimeError") and _free_bytes(path) < 1 << 20:
            raise disk_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise


def disk_error(path: Path, error: OSError) -> TrueupError:
    """The message for an OSError met while writing at or below `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path) >> 20
        return TrueupError(
            f"{path}: the disk is full ({free} MiB free); nothing was lost: free some room and run it again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TrueupError(
            f"{path}: cannot be written ({error.strerror}); choose another place or mend its permissions"
        )
    return TrueupError(f"{error.filename or path}: {error.strerror or error}")


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_writable(directory: Path) -> None:
    """Fail before the work rather than after it: make the directory and write a byte there.

    Raises:
        TrueupError: naming the directory and why.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
