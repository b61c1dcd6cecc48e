"""Votes in SQLite: durable once acknowledged, counted once, and exported as preference data."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trueup.eval.rendering import Messages
from trueup.recipes.errors import TrueupError, UsageError

Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
FORMAT = 1
_TEXTS = ("id", "choice", "left_name", "left_identity", "right_name", "right_identity")
_JSONS = ("left", "right", "settings")
_COLUMNS = ("time", *_TEXTS, *_JSONS)


@dataclass(frozen=True)
class Vote:
    """A verdict of someone who did not know which model stood where.

    Args:
        id: of the comparison: one comparison has one vote.
        left, right: both conversations whole, the system prompt included.
        left_identity, right_identity: the content hashes of the models.
        settings: how the answers were sampled.
        time: seconds since 1970, UTC.
    """

    id: str
    choice: Choice
    left_name: str
    left_identity: str
    left: Messages
    right_name: str
    right_identity: str
    right: Messages
    settings: dict[str, Any]
    time: float = field(default_factory=time.time)

    @property
    def outcome(self) -> float:
        """1: left is better, 0: right is, 0.5: neither."""
        return {"left": 1.0, "right": 0.0}.get(self.choice, 0.5)


class VoteStore:
    """The votes of one file; any number of threads and processes may write at once.

    Raises:
        TrueupError: the file cannot be written, or is no file of votes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for who writes
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version not in (0, FORMAT):
                    raise TrueupError(f"{path}: written by another version of trueup (format {version})")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS votes (id TEXT PRIMARY KEY, time REAL NOT NULL, "
                    f"choice TEXT NOT NULL CHECK (choice IN {CHOICES}), "
                    + ", ".join(f"{name} TEXT NOT NULL" for name in (*_TEXTS[2:], *_JSONS))
                    + ")"
                )
                connection.execute(f"PRAGMA user_version = {FORMAT}")
        except (sqlite3.Error, OSError) as error:
            raise TrueupError(f"{path}: cannot be used for votes ({error}); --votes names another") from error

    def add(self, vote: Vote) -> bool:
        """Store a vote; when this returns it is on the disk.

        Returns:
            False if the comparison has its vote already, which then stays.

        Raises:
            TrueupError: it could not be stored.
        """
        values = {name: getattr(vote, name) for name in _COLUMNS}
        values |= {name: json.dumps(values[name], ensure_ascii=False) for name in _JSONS}
        places = ", ".join(f":{name}" for name in _COLUMNS)
        statement = f"INSERT INTO votes ({', '.join(_COLUMNS)}) VALUES ({places}) ON CONFLICT (id) DO NOTHING"
        try:
            with closing(self._connect()) as connection, connection:
                return connection.execute(statement, values).rowcount == 1
        except sqlite3.OperationalError as error:  # the disk is full, say, or another holds the file too long
            raise TrueupError(f"{self.path}: the vote was not stored ({error}); vote again") from error

    def all(self) -> list[Vote]:
        """Every vote, the oldest first."""
        with closing(self._connect()) as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM votes ORDER BY time, id").fetchall()
        return [Vote(**dict(row) | {name: json.loads(row[name]) for name in _JSONS}) for row in rows]

    def count(self) -> int:
        """How many there are."""
        with closing(self._connect()) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM votes").fetchone()[0])

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30)
        connection.execute("PRAGMA synchronous = FULL")  # an acknowledged vote outlives a loss of power
        return connection


# ------------------------------------------------------------------------------------------------ export


def preference_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """Votes with a winner as rows `prompt, chosen, rejected`, which `dpo`, `kto` and `reward` read.

    The prompt is what both conversations begin with. In a conversation of several turns the answers differ
    from the first one on, so chosen and rejected hold all that follows, as in Anthropic's hh-rlhf.
    """
    for vote in votes:
        if vote.choice not in ("left", "right") or vote.left == vote.right or not _asked_alike(vote):
            continue
        pairs = zip(vote.left, vote.right, strict=True)
        same = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
        sides = {"left": vote.left, "right": vote.right}
        names = {"left": vote.left_name, "right": vote.right_name}
        other = "right" if vote.choice == "left" else "left"
        yield {
            "prompt": vote.left[:same],
            "chosen": sides[vote.choice][same:],
            "rejected": sides[other][same:],
            "model_chosen": names[vote.choice],
            "model_rejected": names[other],
            "vote": vote.id,
        }


def _asked_alike(vote: Vote) -> bool:
    """Whether both were asked the same: no longer so where one had failed to answer in between."""
    left, right = ([turn for turn in side if turn["role"] != "assistant"] for side in (vote.left, vote.right))
    return left == right and len(vote.left) == len(vote.right)


def export(votes: Sequence[Vote], path: Path) -> str:
    """Write the preference rows as JSON lines; returns what became of the votes, in words.

    Raises:
        UsageError: no vote has a winner.
    """
    rows = list(preference_rows(votes))
    if not rows:
        raise UsageError(f"{len(votes)} votes, and none prefers one answer to another: nothing to export")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    counts = Counter(vote.choice for vote in votes)
    equal = len(votes) - len(rows) - counts["tie"] - counts["both_bad"]
    without = {"ties": counts["tie"], "both bad": counts["both_bad"], "with equal answers": equal}
    left_out = ", ".join(f"{count:,} {what}" for what, count in without.items() if count)
    return f"pairs: {len(rows):,}" + (f"; left out: {left_out}" if left_out else "")
