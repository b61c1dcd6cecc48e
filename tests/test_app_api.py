"""The app's named endpoints as `gradio_client` meets them, and what nobody may reach."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_models import MARK, Parrot, Site, make_arena, serving, write_runs
from gradio_client import Client
from gradio_client.exceptions import AppError

from trueup.app.cli import main
from trueup.app.ui import is_loopback, read_users
from trueup.app.ui_page import EXAMPLES, example_prompts
from trueup.recipes.errors import UsageError

MODELS = ["sft", "dpo"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def site(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    parrots = {"parrot": Parrot(["one ", "two ", "three"], pause=0.1)}
    with serving(make_arena(runs, tmp_path_factory.mktemp("votes") / "votes.sqlite", parrots)) as found:
        yield found


@pytest.fixture(scope="module")
def client(site: Site) -> Client:
    return Client(site.url, verbose=False)


def compare(client: Client, **arguments: Any) -> Any:
    usual: dict[str, Any] = {"prompt": "what?", "models": MODELS, "max_tokens": 8}
    return client.predict(api_name="/compare", **usual | arguments)


def test_the_endpoints_are_those_of_the_readme(client: Client) -> None:
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    named = {"/compare", "/regenerate", "/models", "/vote", "/leaderboard", "/preferences", "/report"}
    assert set(found) == named
    readme = (Path(__file__).parent.parent / "app" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in named)


def test_models_are_listed_with_their_kind(client: Client) -> None:
    kinds = {one["name"]: one["kind"] for one in client.predict(api_name="/models")}
    assert kinds["sft"] == "chat"
    assert kinds["reward"] == "reward"
    assert kinds["compare"] == "report"


def test_answers_stream_with_figures_and_go_on_over_turns(client: Client) -> None:
    job = client.submit("what?", ["parrot", "dpo"], max_tokens=8, api_name="/compare")
    texts = [state["answers"][0]["text"] for state in job]
    assert "one " in texts
    assert texts[-1] == "one two three"
    last = job.outputs()[-1]
    figures = last["answers"][1]["figures"]
    assert set(figures["rewards"]) == {"reward"}
    assert figures["reference"] == "sft"
    more = compare(client, prompt="and?", conversation=last["conversation"])
    assert more["conversation"] == last["conversation"]
    again = client.predict(last["conversation"], api_name="/regenerate")
    assert again["answers"][1]["text"] != more["answers"][1]["text"]


def test_a_blind_vote_opens_the_names_and_counts_once(client: Client, site: Site) -> None:
    before = client.predict(api_name="/leaderboard")["votes"]
    state = compare(client, blind=True)
    assert state["votable"]
    assert not {"sft", "dpo"} & set(str(state["answers"]).replace("'", " ").split())
    assert [answer["figures"] for answer in state["answers"]] == [None, None]
    opened = client.predict(state["conversation"], "left", api_name="/vote")
    client.predict(state["conversation"], "right", api_name="/vote")
    assert {answer["model"] for answer in opened["answers"]} == set(MODELS)
    board = client.predict(api_name="/leaderboard")
    assert board["votes"] == before + 1
    [vote] = [vote for vote in site.arena.votes.all() if vote.id == state["conversation"]]
    assert vote.choice == "left"
    [row] = [row for row in client.predict(api_name="/preferences") if row["vote"] == vote.id]
    assert row["chosen"][0]["content"] == opened["answers"][0]["text"]


def test_the_report_is_the_one_of_the_run(client: Client) -> None:
    assert MARK in client.predict("compare", api_name="/report")


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/compare", {"prompt": "x", "models": ["../sft"]}, "is none of the models"),
        ("/compare", {"prompt": " ", "models": ["sft"]}, "nothing to answer"),
        ("/compare", {"prompt": "x", "models": ["sft"], "top_p": 3}, "top_p: 3.0 is out of range"),
        ("/vote", {"conversation": "none", "choice": "left"}, "not known any more"),
        ("/report", {"name": "../../etc/passwd"}, "is none of the reports"),
        ("/report", {"name": "<img src=x onerror=1>"}, "&lt;img src=x"),
    ],
)
def test_mistakes_are_said(client: Client, endpoint: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(api_name=endpoint, **arguments)


def test_a_report_that_leads_out_of_its_folder_is_not_read(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    (tmp_path / "secret.html").write_text("secret")
    (runs / "compare" / "report.html").unlink()
    (runs / "compare" / "report.html").symlink_to(tmp_path / "secret.html")
    from trueup.app.ui_report import report_page

    with pytest.raises(Exception, match=r"has no report\.html"):
        report_page(make_arena(runs, tmp_path / "votes.sqlite"), "compare")


def test_no_file_is_served_neither_outside_nor_inside_the_runs(
    site: Site, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.txt").write_text("secret")
    monkeypatch.chdir(tmp_path)
    places = ["/etc/passwd", "here.txt", str(site.arena.votes.path), str(runs / "sft" / "config.json")]
    for place in (*places, "../../../../etc/passwd", "/proc/self/environ"):
        for route in ("file", "file=", "file/"):
            found = httpx.get(f"{site.url}gradio_api/{route}{place}", follow_redirects=True)
            assert found.status_code in (403, 404), (place, route)


def test_what_takes_files_takes_none_of_size(site: Site) -> None:
    big = httpx.post(f"{site.url}gradio_api/upload", files={"files": ("x.bin", b"0" * 100_000)})
    assert big.status_code == 413


def test_with_auth_nothing_answers_without_a_password(runs: Path, tmp_path: Path) -> None:
    with serving(make_arena(runs, tmp_path / "votes.sqlite"), auth=[("ann", "secret")]) as guarded:
        for path in ("config", "gradio_api/info"):
            assert httpx.get(guarded.url + path).status_code == 401
        with pytest.raises(ValueError, match="Could not login"):  # as Gradio's client puts a refusal
            Client(guarded.url, auth=("ann", "wrong"), verbose=False)
        inside = Client(guarded.url, auth=("ann", "secret"), verbose=False)
        assert inside.predict(api_name="/leaderboard")["votes"] == 0


def test_examples_come_from_what_the_runs_were_compared_on(runs: Path, tmp_path: Path) -> None:
    assert example_prompts(make_arena(runs, tmp_path / "votes.sqlite")) == ["what is 0?", "what is 1?"]
    assert example_prompts(make_arena(runs / "sft", tmp_path / "votes.sqlite")) == list(EXAMPLES)


def test_the_file_of_users(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("ann:se:cret\n\nbob:x\n")
    assert read_users(path) == [("ann", "se:cret"), ("bob", "x")]
    for text, message in (("ann\n", r"users:1: is not USER:PASSWORD$"), ("\n", "holds no")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_users(path)
    with pytest.raises(UsageError, match="No such file"):
        read_users(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_which_addresses_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ([], "there is no folder runs/"),
        (["nowhere"], "no such directory"),
        ([str(runs / "reward")], "there is no language model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["app", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
