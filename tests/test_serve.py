"""`trueup serve`, as OpenAI's own client and our judge see it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from app_models import Parrot
from compare_models import write_model

from trueup.app import serve_api
from trueup.app.cli import main
from trueup.app.models_pool import Loaded, ModelPool, find_entries
from trueup.app.serve_api import build_api
from trueup.eval.judge import JudgeScorer

ASK: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]


@contextmanager
def serving(loaded: Loaded) -> Iterator[str]:
    """The server on a free port; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_api(loaded, "127.0.0.1"), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model(tmp_path_factory.mktemp("runs") / "tiny", "sft")
    pool = ModelPool(find_entries([str(folder)]), 1 << 30)
    with pool.using("tiny") as loaded, serving(loaded) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def create(client: openai.OpenAI, model: str = "tiny", **options: Any) -> Any:
    usual: dict[str, Any] = {"messages": ASK, "max_tokens": 12, "seed": 4}
    return client.chat.completions.create(model=model, **usual | options)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_a_reply_has_text_reason_and_usage_and_repeats_with_its_seed(client: openai.OpenAI) -> None:
    first, again, other = (create(client, seed=seed) for seed in (4, 4, 5))
    [choice] = first.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert first.usage.completion_tokens <= 12
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert choice.message.content == again.choices[0].message.content != other.choices[0].message.content


def test_a_stream_is_the_same_reply_in_pieces(client: openai.OpenAI) -> None:
    whole = create(client)
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_temperature_0_stop_words_and_longest_replies() -> None:
    parrot = Parrot(["one ", "two ", "three ", "four "])
    with serving(parrot.loaded("parrot")) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        cut = create(client, "parrot", max_tokens=None, max_completion_tokens=2).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("one two ", "length")
        for stream in (False, True):
            found = create(client, "parrot", stop=["three", "four"], temperature=0, stream=stream)
            if stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == "one two "
            else:
                assert (found.choices[0].message.content, found.choices[0].finish_reason) == (
                    "one two ",
                    "stop",
                )
        parts = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
        assert create(client, "parrot", messages=parts).choices[0].message.content == "one two three four "


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "gpt-5"}, 404, "there is no model 'gpt-5' here, but 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "the last must be the user's"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "type",
        ),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "tokens, and the model takes 512"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n:"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else next(iter(value)),
)
def test_what_cannot_be_done_is_refused_in_openai_s_words(
    client: openai.OpenAI, options: dict[str, Any], status: int, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, **options)
    assert caught.value.status_code == status
    assert message in caught.value.message


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    alone = [create(client, seed=seed).choices[0].message.content for seed in range(8)]
    together: dict[int, str] = {}

    def ask(seed: int) -> None:
        together[seed] = create(client, seed=seed, stream=False).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(8)] == alone


def test_a_client_that_goes_away_ends_its_reply_and_a_full_queue_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_api, "AT_ONCE", 1)
    monkeypatch.setattr(serve_api, "WAITING", 0)
    parrot = Parrot(["word "] * 3000, pause=0.01)
    with serving(parrot.loaded("parrot")) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        going = create(client, "parrot", stream=True, max_tokens=3000)
        next(iter(going))
        next(iter(going))
        with pytest.raises(openai.RateLimitError, match="waiting already"):
            create(client, "parrot")
        going.close()
        for _ in range(100):  # the place is free as soon as the server has noticed
            try:
                assert create(client, "parrot", max_tokens=1).choices[0].message.content == "word "
                break
            except openai.RateLimitError:
                time.sleep(0.05)
        else:
            pytest.fail("the reply went on without its client")


def test_a_page_in_a_browser_cannot_reach_it_by_another_name(address: str) -> None:
    assert httpx.get(f"{address}/models", headers={"Host": "evil.example"}).status_code == 400
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{address}/models", headers={"Origin": "http://evil"}).headers
    )


def test_the_judge_of_a_comparison_can_use_it() -> None:
    parrot = Parrot(["Both fine. ", "[[C]]"])
    with serving(parrot.loaded("parrot")) as address:
        judge = JudgeScorer(address, "parrot", retries=0)
        assert judge(["q"], ["a"], reference=["b"]) == [0.5]


def test_mistakes_are_said_before_it_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    folder = write_model(tmp_path / "tiny", "sft")
    for words, code, message in (
        ([str(tmp_path / "nowhere")], 2, "no such model directory"),
        ([str(folder), "--port", str(taken.getsockname()[1])], 1, "cannot be listened on"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["serve", *words])
        assert stopped.value.code == code
        assert message in capsys.readouterr().err
