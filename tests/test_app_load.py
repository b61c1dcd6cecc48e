"""The app as a process of its own: eight users at once, and kill -9 while they vote.

With TRUEUP_RUNS (a folder of runs) it is those models, else tiny ones.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from app_models import write_runs
from gradio_client import Client

from trueup.app.votes import CHOICES, VoteStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("TRUEUP_RUNS")
    return Path(named) if named else write_runs(tmp_path_factory.mktemp("runs"))


@contextmanager
def app(runs: Path, votes: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`trueup app` in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["app", str(runs), "--votes", str(votes), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "trueup.app", *words])
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                httpx.get(url)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url, process
    finally:
        process.kill()
        process.wait()


class User(threading.Thread):
    """Compares blindly and votes, again and again, until told to stop.

    Attributes:
        first: seconds from asking to the first word, per comparison.
        acknowledged: the comparisons whose vote was acknowledged -> its choice.
        error: what ended it.
    """

    def __init__(self, url: str, models: list[str], going: Callable[[], bool], seed: int) -> None:
        super().__init__(daemon=True)
        self.url, self.models, self.going, self.chance = url, models, going, random.Random(seed)
        self.first: list[float] = []
        self.acknowledged: dict[str, str] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            client = Client(self.url, verbose=False)
            while self.going():
                state = self._compare(client)
                choice = self.chance.choice(CHOICES)
                opened = client.predict(state["conversation"], choice, api_name="/vote")
                self.acknowledged[state["conversation"]] = opened["choice"]
        except Exception as error:
            self.error = error

    def _compare(self, client: Client) -> Any:
        asked, state = time.monotonic(), None
        question = f"What is {self.chance.randint(1, 9)} plus {self.chance.randint(1, 9)}?"
        options = {"blind": True, "max_tokens": 64, "temperature": 1.0, "seed": self.chance.randint(0, 99)}
        job = client.submit(question, self.models, api_name="/compare", **options)
        told = False
        for state in job:
            if not told and any(answer["text"] for answer in state["answers"]):
                self.first.append(time.monotonic() - asked)
                told = True
        return state


def chat_models(url: str) -> list[str]:
    found = Client(url, verbose=False).predict(api_name="/models")
    return [one["name"] for one in found if one["kind"] == "chat" and one["name"] != "damaged"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_users_for_a_minute(runs: Path, tmp_path: Path) -> None:
    with app(runs, tmp_path / "votes.sqlite") as (url, _):
        models = chat_models(url)
        ends = time.monotonic() + 60
        users = [User(url, models, lambda: time.monotonic() < ends, seed) for seed in range(8)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    assert [user.error for user in users] == [None] * 8
    acknowledged = {id: choice for user in users for id, choice in user.acknowledged.items()}
    stored = VoteStore(tmp_path / "votes.sqlite").all()
    assert {vote.id: vote.choice for vote in stored} == acknowledged
    assert len(stored) == len(acknowledged) == sum(len(user.acknowledged) for user in users)
    first = np.array([seconds for user in users for seconds in user.first])
    quantiles = " ".join(f"p{q} {np.percentile(first, q):.2f} s" for q in (50, 90, 99))
    print(f"\n{len(stored)} votes, first word after: {quantiles}, at most {first.max():.2f} s")
    assert len(stored) >= 8


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_every_acknowledged_vote_is_there_after_kill_9(runs: Path, tmp_path: Path) -> None:
    acknowledged: dict[str, str] = {}
    for round in range(3):
        with app(runs, tmp_path / "votes.sqlite") as (url, process):
            models = chat_models(url)
            users = [User(url, models, lambda: True, 10 * round + seed) for seed in range(4)]
            for user in users:
                user.start()
            while sum(len(user.acknowledged) for user in users) < random.Random(round).randint(6, 20):
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1)  # for answers already on their way; Gradio's client waits on for what never comes
            for user in users:
                acknowledged |= dict(user.acknowledged)
        stored = {vote.id: vote.choice for vote in VoteStore(tmp_path / "votes.sqlite").all()}
        assert acknowledged.items() <= stored.items()
    with app(runs, tmp_path / "votes.sqlite") as (url, _):
        assert Client(url, verbose=False).predict(api_name="/leaderboard")["votes"] == len(stored)
