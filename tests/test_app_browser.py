"""The app in a browser: headless Chromium does what a user does."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_models import MARK, Parrot, Site, make_arena, serving, write_runs

playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra's playwright is not installed")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian: apt-get install chromium"),
    pytest.mark.timeout(300),
]
PATIENCE = 60_000  # ms: a loaded machine is slow, and nothing here measures speed

SCRIPT = "<script>document.body.dataset.hurt = 1</script><img src=x onerror='document.body.dataset.hurt = 2'>"
PICTURE = "![x](http://evil.example/pixel.png) [link](javascript:alert(1)) ${alert(1)} {{constructor}} $x^2$"
RTL = "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈"
LONG = "x" * 10_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    hostile = [SCRIPT, PICTURE, RTL, EMOJI, *[LONG] * 10]
    parrots = {
        "hostile": Parrot(hostile),
        "slow": Parrot([f"slow{n} " for n in range(400)], pause=0.03),
        "steady": Parrot([f"steady{n} " for n in range(40)], pause=0.03),
        "yes": Parrot(["yes"]),
        "no": Parrot(["no"]),
    }
    runs = write_runs(tmp_path_factory.mktemp("runs"))
    with serving(make_arena(runs, tmp_path_factory.mktemp("votes") / "votes.sqlite", parrots)) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, site: Site) -> Iterator[Any]:
    """A new visitor's page; it must have asked no other machine for anything, and met no error."""
    visitor = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = visitor.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site.url)
    page.wait_for_selector("#compare-prompt textarea")
    yield page
    assert not [url for url in asked if not url.startswith((site.url, "data:", "blob:"))]
    assert not errors
    assert page.evaluate("document.body.dataset.hurt") is None
    visitor.close()


def choose(page: Any, *names: str) -> None:
    """Exactly these models in the Compare tab."""
    tokens = page.locator("#compare-models .token-remove")
    page.locator("#compare-models .remove-all").click()
    expect(tokens.locator("visible=true")).to_have_count(0)
    for name in names:
        page.locator("#compare-models input").click()
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")
    for place, name in enumerate(names):
        expect(page.locator(".pane-name").nth(place)).to_contain_text(name)


def send(page: Any, box: str, text: str) -> None:
    page.fill(f"{box} textarea", text)
    page.press(f"{box} textarea", "Enter")


def answer(page: Any, place: int) -> Any:
    """The last answer in a pane."""
    return page.locator(f"#pane-{place} .bot.message").last


def blind_round(page: Any, key: str) -> str:
    """Ask, vote by a key, and return what is said of it."""
    send(page, "#compare-prompt", "which?")
    expect(page.locator("#vote-left")).to_be_visible()
    expect(page.locator("#compare-prompt textarea")).not_to_be_focused()
    page.keyboard.press(key)
    expect(page.locator(".reveal")).to_be_visible()
    return str(page.locator(".reveal").inner_text())


def test_two_answers_stream_side_by_side_with_figures(page: Any) -> None:
    choose(page, "slow", "steady")
    send(page, "#compare-prompt", "what?")
    expect(answer(page, 0)).to_contain_text("slow3")
    expect(answer(page, 1)).to_contain_text("steady3")
    assert "steady39" not in answer(page, 1).inner_text()  # still growing, both of them
    assert "slow39" not in answer(page, 0).inner_text()
    expect(answer(page, 1)).to_contain_text("steady39")
    page.locator("#compare-prompt .stop-button").click()
    expect(page.locator(".figures").first).to_contain_text("stopped")
    expect(page.locator("#compare-prompt .submit-button")).to_be_visible()


def test_figures_of_real_models_and_a_model_that_cannot_load(page: Any) -> None:
    choose(page, "dpo", "damaged")
    send(page, "#compare-prompt", "what?")
    expect(page.locator(".figures.failed")).to_contain_text("model.safetensors: the file is cut short")
    expect(page.locator(".figures").first).to_contain_text(
        re.compile(r"tokens?.* s\s+reward [+-].*KL .* from sft", re.S)
    )


def test_blind_votes_by_keyboard_reach_the_leaderboard_and_stay_after_a_reload(page: Any, site: Site) -> None:
    before = {vote.id for vote in site.arena.votes.all()}
    choose(page, "yes", "no")
    page.check("#compare-blind input")
    expect(page.locator(".pane-name").first).to_have_text("Left")
    send(page, "#compare-prompt", "which?")
    expect(page.locator("#vote-left")).to_be_visible()
    assert page.locator(".pane-name").all_inner_texts()[:2] == ["Left", "Right"]
    page.fill("#compare-prompt textarea", "bt")  # typing is not voting
    page.press("#compare-prompt textarea", "ArrowLeft")
    assert {vote.id for vote in site.arena.votes.all()} == before
    for key, said in (
        ("ArrowLeft", "left answer"),
        ("ArrowRight", "right answer"),
        ("t", "tie"),
        ("b", "both bad"),
    ):
        assert said in blind_round(page, key)
        sides = {answer(page, place).inner_text().strip() for place in (0, 1)}
        assert sides == {"yes", "no"}
        assert (
            answer(page, 0).inner_text().strip() == page.locator(".pane-name").first.inner_text().split()[0]
        )
    cast = [vote for vote in site.arena.votes.all() if vote.id not in before]
    assert [vote.choice for vote in cast] == ["left", "right", "tie", "both_bad"]
    page.reload()
    page.get_by_role("tab", name="Leaderboard").click()
    expect(page.locator(".board")).to_contain_text(f"{len(before) + 4} votes")
    expect(page.locator(".board")).to_contain_text(re.compile("yes : no|no : yes"))


def test_the_votes_are_downloaded_as_preference_data(page: Any, site: Site) -> None:
    choose(page, "yes", "no")
    page.check("#compare-blind input")
    expect(page.locator(".pane-name").first).to_have_text("Left")
    blind_round(page, "ArrowLeft")
    page.get_by_role("tab", name="Leaderboard").click()
    with page.expect_download() as begun:
        page.click("#export")
    assert begun.value.suggested_filename == "preferences.jsonl"
    rows = [json.loads(line) for line in Path(begun.value.path()).read_text().splitlines()]
    assert rows[-1]["prompt"] == [{"role": "user", "content": "which?"}]
    assert rows[-1]["chosen"][0]["content"] == rows[-1]["model_chosen"]
    assert rows[-1]["vote"] == site.arena.votes.all()[-1].id


def test_chat_stops_edits_regenerates_and_downloads(page: Any, site: Site) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.locator("#chat-model input").click()
    page.get_by_role("option", name="slow", exact=True).click()
    send(page, "#chat-prompt", "go on")
    said = page.locator("#chat .bot.message").last
    expect(said).to_contain_text("slow3")
    page.locator("#chat-prompt .stop-button").click()
    expect(page.locator("#chat-prompt .submit-button")).to_be_visible()
    stopped = said.inner_text()
    assert "slow399" not in stopped
    page.wait_for_timeout(500)
    assert said.inner_text() == stopped
    assert all(loaded.users == 0 for loaded in site.arena.pool.loaded.values())
    page.locator("#chat-model input").click()
    page.get_by_role("option", name="sft", exact=True).click()
    page.get_by_label("Retry").or_(page.locator("#chat [title='Retry']")).first.click()
    expect(page.locator("#chat-figures .figures")).not_to_contain_text("stopped")
    expect(page.locator("#chat-figures")).to_contain_text("reward")
    expect(said).not_to_contain_text("slow")
    with page.expect_download() as begun:
        page.click("#chat-download")
    row = json.loads(Path(begun.value.path()).read_text())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "go on"


def test_hostile_text_is_shown_as_text(page: Any) -> None:
    choose(page, "hostile", "yes")
    send(page, "#compare-prompt", SCRIPT + PICTURE)
    expect(page.locator(".figures").first).to_contain_text("token")
    shown = page.locator("#pane-0 .message")
    for place, hostile in ((0, SCRIPT), (0, PICTURE), (1, SCRIPT), (1, PICTURE), (1, RTL), (1, EMOJI)):
        assert hostile in shown.nth(place).text_content()
    assert shown.nth(1).text_content().count("x") >= 100_000
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#pane-0 button[aria-label='Copy message']").first.click()
    copied = page.wait_for_function("navigator.clipboard.readText()").json_value()
    assert copied == SCRIPT + PICTURE
    for tag in ("script", "img", "a", "iframe", ".katex"):
        assert page.locator(f"#pane-0 .message {tag}").count() == 0
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1280  # it wraps


def test_the_report_is_embedded_and_its_scripts_do_not_run(page: Any) -> None:
    page.get_by_role("tab", name="Report").click()
    frame = page.frame_locator("iframe.report")
    expect(frame.locator("h1")).to_have_text(MARK)
    assert "${x}" in frame.locator("body").text_content()
    assert page.evaluate("window.hurt") is None


def test_examples_fill_the_prompt_and_a_phone_has_room(chromium: Any, site: Site) -> None:
    phone = chromium.new_context(viewport={"width": 390, "height": 800}, is_mobile=True, color_scheme="dark")
    page = phone.new_page()
    page.goto(site.url)
    page.wait_for_selector("#compare-prompt textarea")
    page.get_by_role("button", name="what is 1?").first.click()
    expect(page.locator("#compare-prompt textarea")).to_have_value("what is 1?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for tab in ("Compare", "Leaderboard", "Chat", "Report"):
        expect(page.get_by_role("tab", name=tab)).to_be_visible()
    phone.close()
