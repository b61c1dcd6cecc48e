"""Votes: once, durable, concurrent, and as data that the stages read."""

import json
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sft_models import run

from trueup.app.votes import Vote, VoteStore, export, preference_rows
from trueup.base.data import DataArguments, load_data
from trueup.recipes.errors import TrueupError, UsageError


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def vote(number: int = 0, choice: Any = "left", **changes: Any) -> Vote:
    asked = f"what is {number} times 2?"
    usual: dict[str, Any] = {
        "left_name": "sft",
        "left_identity": "a" * 64,
        "left": turns(asked, f"it is {2 * number}"),
    }
    usual |= {"right_name": "dpo", "right_identity": "b" * 64, "right": turns(asked, "what")}
    usual |= {"id": f"{number:032}", "choice": choice, "settings": {"seed": 1}}
    return Vote(**usual | changes)


def test_a_vote_comes_back_as_it_was(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "new" / "votes.sqlite")
    cast = vote(left=turns("<b>?", "\u202e🙂\0'; DROP TABLE votes; --"), time=5.0)
    assert store.add(cast)
    assert VoteStore(store.path).all() == [cast]


def test_a_comparison_has_one_vote_and_the_first_stays(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite")
    assert [store.add(vote(1, "left")), store.add(vote(1, "right"))] == [True, False]
    assert [one.choice for one in store.all()] == ["left"]
    with pytest.raises(sqlite3.IntegrityError):
        store.add(vote(2, "middle"))


def test_a_vote_that_cannot_be_stored_says_so(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite")
    with sqlite3.connect(store.path) as other:
        other.execute("DROP TABLE votes")
    with pytest.raises(TrueupError, match=r"votes\.sqlite: the vote was not stored \(no such table"):
        store.add(vote(1))


def test_many_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    VoteStore(path)

    def cast(worker: int) -> None:
        store = VoteStore(path)
        for number in range(10):
            store.add(vote(100 * (worker // 2) + number))  # every two workers cast the same ones

    threads = [threading.Thread(target=cast, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert VoteStore(path).count() == 40


def test_a_file_that_is_none_of_votes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no votes in here, and long enough to be read as a file\n" * 20)
    with pytest.raises(TrueupError, match=r"notes\.txt: cannot be used for votes .*--votes"):
        VoteStore(tmp_path / "notes.txt")


def test_rows_hold_what_differs_after_what_is_shared() -> None:
    said = turns("a", "b", "c")
    longer = vote(3, "right", left=turns("q", "x", "more?", "y"), right=turns("q", "z", "more?", "w"))
    equal = vote(4, "left", left=said, right=said)
    failed = vote(
        7, "left", left=turns("q", "x"), right=turns("q", "x", "q", "z")
    )  # left did not answer first
    [short, long] = preference_rows([vote(2), vote(5, "tie"), vote(6, "both_bad"), longer, equal, failed])
    assert short["prompt"] == turns("what is 2 times 2?")
    assert [short["chosen"][0]["content"], short["rejected"][0]["content"]] == ["it is 4", "what"]
    assert (short["model_chosen"], short["model_rejected"]) == ("sft", "dpo")
    assert long["prompt"] == turns("q")
    assert [turn["content"] for turn in long["chosen"]] == ["z", "more?", "w"]
    assert [turn["content"] for turn in long["rejected"]] == ["x", "more?", "y"]


def test_the_export_says_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    assert export([vote(1), vote(2, "tie"), vote(3, "both_bad"), vote(4)], path) == (
        "pairs: 2; left out: 1 ties, 1 both bad"
    )
    rows = load_data(
        DataArguments(dataset_name=str(path), validation_split_size=0, test_split_size=0),
        "train",
        "preference",
    )
    assert [row["chosen"][0]["content"] for row in rows] == ["it is 2", "it is 8"]
    with pytest.raises(UsageError, match="2 votes, and none prefers"):
        export([vote(1, "tie"), vote(2, "both_bad")], path)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_the_stages_read_it_as_it_is(stage: str, tmp_path: Path, recipe: Callable[..., Any]) -> None:
    """Single turns, a system prompt, and conversations of several turns."""
    several = [
        vote(
            100 + n, "right", left=turns(f"hi {n}", "a", "so?", "b"), right=turns(f"hi {n}", "c", "so?", "d")
        )
        for n in range(8)
    ]
    system = [{"role": "system", "content": "be brief"}]
    told = [vote(n, left=system + vote(n).left, right=system + vote(n).right) for n in range(40, 50)]
    export([*map(vote, range(1, 40)), *several, *told], tmp_path / "preferences.jsonl")
    keys: dict[str, Any] = {"calibration_prompts": 0} if stage == "reward" else {}
    out = run(
        recipe(
            name=stage,
            stage=stage,
            dataset_name=str(tmp_path / "preferences.jsonl"),
            max_steps=2,
            save_steps=2,
            **keys,
        )
    )
    assert json.loads((out / "trueup.json").read_text())["stage"] == stage


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_acknowledged_votes_outlive_kill_9(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from trueup.app.votes import Vote, VoteStore  # and nothing heavy: five processes begin anew
store = VoteStore(Path(sys.argv[1]))
number = store.count()
while True:
    number += 1
    said = [{"role": "user", "content": "what?"}]
    if store.add(Vote(str(number), "left", "a", "a", said, "b", "b", said, {})):
        print(number, flush=True)
"""
    acknowledged: set[int] = set()
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "votes.sqlite")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(random.randint(1, 60)):
            acknowledged.add(int(child.stdout.readline()))
        child.kill()
        acknowledged |= {int(line) for line in child.stdout.read().split("\n")[:-1]}
        child.wait()
    stored = {int(one.id) for one in VoteStore(tmp_path / "votes.sqlite").all()}
    assert acknowledged <= stored
