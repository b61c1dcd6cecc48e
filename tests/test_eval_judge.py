"""The judge, against a server of our own that answers as an OpenAI-compatible endpoint does."""

import math
import time
from collections.abc import Iterator

import pytest
from judge_endpoint import Endpoint, longer_is_better, replies, serving

from trueup.eval.judge import JudgeScorer, parse_verdict
from trueup.eval.scorers import resolve_scorer
from trueup.recipes.errors import TrueupError, UsageError


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


def test_both_orders_are_asked_and_agree(endpoint: Endpoint) -> None:
    endpoint.answer = longer_is_better
    judge = resolve_scorer("judge", base_url=endpoint.url, model="m")
    chat = [{"role": "user", "content": "Why?"}]
    ours = ["aaa", "a", [{"role": "assistant", "content": "bb"}]]
    found = judge(["p {braces}", "p", chat], ours, reference=["a", "aaa", "cc"])
    assert found == [1, 0, 0.5]
    assert sorted(replies(one["messages"][0]["content"]) for one in endpoint.requests) == sorted(
        [("aaa", "a"), ("a", "aaa"), ("a", "aaa"), ("aaa", "a"), ("bb", "cc"), ("cc", "bb")]
    )
    assert {(one["path"], one["model"], one["temperature"]) for one in endpoint.requests} == {
        ("/v1/chat/completions", "m", 0)
    }
    assert any("user: Why?" in one["messages"][0]["content"] for one in endpoint.requests)
    assert judge.name == "judge:m"


def test_a_judge_that_always_takes_the_first_gives_ties_and_is_found_out(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: (200, "[[A]]")
    judge = JudgeScorer(endpoint.url, "m")
    assert judge.compare(["p"] * 4, ["a"] * 4, ["b"] * 4) == [0.5] * 4
    assert (judge.judged, judge.disagreed, judge.malformed) == (4, 4, 0)


def test_malformed_verdicts_are_counted_and_decide_nothing(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: (200, "I cannot say" if replies(question)[0] == "odd" else "[[A]]")
    judge = JudgeScorer(endpoint.url, "m")
    found = judge.compare(["p", "p"], ["odd", "a"], ["b", "b"])
    assert math.isnan(found[0])
    assert found[1] == 0.5
    assert (judge.judged, judge.malformed) == (2, 1)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("[[A]] no, [[B]]", "B"), ("[[C]]", "tie"), ("[A]", None), ("", None), ("[[D]]", None)],
)
def test_the_last_verdict_counts(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(endpoint: Endpoint, status: int) -> None:
    failures = iter([status, status])
    endpoint.answer = lambda question: (next(failures, 200), "[[C]]")
    assert JudgeScorer(endpoint.url, "m", concurrency=1).compare(["p"], ["a"], ["b"]) == [0.5]
    assert len(endpoint.requests) == 4


def test_what_does_not_pass_ends_with_one_message(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: (503, "busy")
    with pytest.raises(TrueupError, match=r"cannot be reached after 3 tries: 503"):
        JudgeScorer(endpoint.url, "m", retries=2, concurrency=1).compare(["p"], ["a"], ["b"])
    endpoint.answer = lambda question: (200, {"error": "no choices here"})
    with pytest.raises(TrueupError, match="does not answer as an OpenAI-compatible endpoint"):
        JudgeScorer(endpoint.url, "m", concurrency=1).compare(["p"], ["a"], ["b"])
    with pytest.raises(TrueupError, match=r"cannot be reached after 2 tries"):
        JudgeScorer("http://127.0.0.1:9/v1", "m", retries=1, retry_wait=0.0).compare(["p"], ["a"], ["b"])


def test_a_server_that_hangs_times_out(endpoint: Endpoint) -> None:
    def hang(question: str) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, "[[A]]"

    endpoint.answer = hang
    judge = JudgeScorer(endpoint.url, "m", timeout=0.05, retries=1, retry_wait=0.0, concurrency=1)
    with pytest.raises(TrueupError, match="timed out"):
        judge.compare(["p"], ["a"], ["b"])


def test_the_key_goes_to_the_server_and_nowhere_else(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    endpoint.answer = lambda question: (401, "wrong key sk-secret")
    judge = JudgeScorer(endpoint.url, "m", api_key_env="MY_KEY", concurrency=1)
    with pytest.raises(TrueupError, match=r"refuses: 401 .*\$MY_KEY") as raised:
        judge.compare(["p"] * 50, ["a"] * 50, ["b"] * 50)
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-secret"
    assert len(endpoint.requests) < 10  # a refusal is final, and the rest is not asked
    assert "sk-secret" not in str(raised.value) + repr(vars(judge)) + "".join(capfd.readouterr())
    monkeypatch.delenv("MY_KEY")
    endpoint.answer = longer_is_better
    judge.compare(["p"], ["a"], ["b"])
    assert "Authorization" not in endpoint.headers[-1]


def test_wrong_use_is_told(endpoint: Endpoint) -> None:
    with pytest.raises(UsageError, match=r"r.yaml:4: judge: needs the base_url"):
        resolve_scorer("judge", place="r.yaml:4", model="m")
    with pytest.raises(UsageError, match="is not an address"):
        JudgeScorer("localhost:8000", "m")
    with pytest.raises(UsageError, match="a column `reference`"):
        JudgeScorer(endpoint.url, "m")(["p"], ["a"])
