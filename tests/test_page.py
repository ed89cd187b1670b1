"""The page, in a real browser: Debian's chromium, driven by Playwright."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from postgres import require
from serving import KEYS, running
from talking import talking_model, talking_tokenizer

from gru_memory.server import memory_routes
from gru_memory.server.settings import owner_of

BOAT, HOME = "My boat is called Marigold.", "I live in Porto."
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


@pytest.fixture(scope="module")
def browser():
    require(CHROMIUM, "there is no chromium: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(loaded, tmp_path_factory):
    with running(tmp_path_factory.mktemp("page") / "s", loaded, api_keys=()) as server:
        yield server


@pytest.fixture(scope="module")
def server_without_text(loaded, tmp_path_factory):
    with running(tmp_path_factory.mktemp("no text") / "s", loaded, api_keys=(), keep_text=False) as server:
        yield server


@pytest.fixture
def page(browser, server, request):
    """The page in a session of its own. $GRU_MEMORY_SCREENSHOTS is a folder for a picture of how each test ended."""
    marker = request.node.get_closest_marker("looks")
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | (marker.kwargs if marker else {})))
    name = re.sub(r"\W+", " ", request.node.name)
    context.add_init_script(f"localStorage.getItem('session') || localStorage.setItem('session', {name!r})")
    page = context.new_page()
    page.set_default_timeout(30_000)
    wrong, page.refusals = [], ["404", "401"]  # a new session is not there yet; a test may add others
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.session_name = name
    opened(page, server)
    yield page
    if folder := os.environ.get("GRU_MEMORY_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    context.close()
    assert [text for text in wrong if not any(status in text for status in page.refusals)] == []


def opened(page, server):
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=yes]")


def expect(locator, count):
    """Wait until there are so many. (Playwright's own waiting for expressions is against the page's policy.)"""
    from playwright import sync_api

    sync_api.expect(locator).to_have_count(count, timeout=30_000)


def tell(page, text):
    """Type and send with the keyboard alone; returns the reply."""
    count = page.locator("#turns li").count()
    page.locator("#message").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    expect(page.locator("#turns li"), count + 1)
    page.wait_for_selector("#send:enabled")
    assert page.locator("#status").inner_text() == ""
    return page.locator("#turns li .reply").last.inner_text()


def pixels(page):
    """The heat map, as the browser drew it."""
    return page.evaluate("document.getElementById('map').toDataURL()")


def test_tell_see_the_map_change_reload_still_there(page, server, loaded):
    assert page.locator("#slots li").count() == 0
    empty = pixels(page)
    reply = tell(page, BOAT)
    assert reply
    first = pixels(page)
    assert first != empty
    assert "tokens" in page.locator("#map").get_attribute("aria-label")
    page.get_by_role("button", name="read", exact=True).click()
    read = pixels(page)
    assert read != first
    page.get_by_role("button", name="written", exact=True).click()
    assert pixels(page) == first
    tell(page, HOME)
    assert pixels(page) != first
    slots = page.locator("#slots li").count()
    assert 0 < slots <= loaded[0].memory_config.num_heads * loaded[0].memory_config.num_slots
    bars = page.eval_on_selector_all("#slots .bar i", "found => found.map((bar) => parseFloat(bar.style.width))")
    strengths = [float(text) for text in page.locator("#slots li span:nth-child(3)").all_inner_texts()]
    assert bars == sorted(bars, reverse=True) and bars[0] == 100 and len(bars) == slots
    assert strengths == sorted(strengths, reverse=True) and strengths[0] > 0
    assert all(page.locator("#slots .words").all_inner_texts())
    memory, cache = page.locator("#state-size").inner_text(), page.locator("#kv-size").inner_text()
    assert memory.endswith("KB") and cache.endswith("KB")
    before = page.locator("#turns").inner_text(), pixels(page)

    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert (page.locator("#turns").inner_text(), pixels(page)) == before
    session = server.store.get(page.session_name)
    assert [turn.user for turn in server.store.transcript(session)] == [BOAT, HOME]


def test_the_answer_streams(page, server):
    page.evaluate(
        """() => {
            window.seen = new Set();
            const log = document.getElementById("turns");
            new MutationObserver(() => window.seen.add(log.querySelector("li:last-child .reply")?.textContent))
                .observe(log, {subtree: true, childList: true, characterData: true});
        }"""
    )
    reply = tell(page, BOAT)
    seen = [text for text in page.evaluate("[...window.seen]") if text]
    assert len(seen) >= 2 and seen[-1] == reply
    assert all(reply.startswith(text) for text in seen)


def test_what_was_said_before_is_said_again(page, server):
    for _ in range(2):
        tell(page, "hello")
    session = server.store.get(page.session_name)
    assert [turn.user for turn in server.store.transcript(session)] == ["hello", "hello"]
    shown = page.locator("#turns").inner_text()
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.locator("#turns .user").all_inner_texts() == ["hello", "hello"]
    assert page.locator("#turns").inner_text() == shown


@pytest.fixture
def slow(server, monkeypatch):
    """Replies of a token or so in a fifth of a second."""
    monkeypatch.setattr(server.engine, "on_step", lambda rows, tokens: time.sleep(0.2))


def begin_to_tell(page, text):
    """Send, and wait until some of the reply is there."""
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")
    page.locator("#turns li:last-child .reply:not(:empty)").wait_for()


def idle(server):
    """Wait until no reply is in progress."""
    while server.engine.active or server.engine.waiting:
        time.sleep(0.01)


@pytest.mark.parametrize("stop", ["button", "Escape"])
def test_what_is_stopped_is_not_kept(page, server, slow, stop):
    tell(page, HOME)
    before = server.store.get(page.session_name)
    begin_to_tell(page, BOAT)
    page.get_by_role("button", name="Stop").click() if stop == "button" else page.keyboard.press("Escape")
    page.get_by_text("Stopped; this turn was not kept.").wait_for()
    page.wait_for_selector("#stop", state="hidden")
    assert page.locator("#turns .user").all_inner_texts() == [HOME]
    assert page.locator("#message").input_value() == BOAT
    idle(server)
    assert server.store.get(page.session_name) == before
    page.keyboard.press("Enter") if stop == "Escape" else page.locator("#send").click()
    expect(page.locator("#turns li"), 2)
    page.wait_for_selector("#send:enabled")
    said = server.store.transcript(server.store.get(page.session_name))
    assert [turn.user for turn in said] == [HOME, BOAT]


def test_what_is_stopped_after_it_was_kept_is_shown_as_it_is_stored(page, server, monkeypatch):
    commit, kept, noticed = server.store.commit, threading.Event(), threading.Event()

    def slow(*arguments):
        made = commit(*arguments)
        kept.set()
        noticed.wait(10)
        return made

    monkeypatch.setattr(server.store, "commit", slow)
    page.locator("#message").fill(BOAT)
    page.keyboard.press("Enter")
    assert kept.wait(30)
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    noticed.set()
    [turn] = server.store.transcript(server.store.get(page.session_name))
    assert page.locator("#turns .user").all_inner_texts() == [turn.user] == [BOAT]
    assert page.locator("#turns .reply").all_text_contents() == [turn.reply]
    assert page.locator("#message").input_value() == ""


@pytest.mark.parametrize("refused", ["?slots=", "/trace"])
def test_a_turn_that_was_kept_stays_though_its_memory_cannot_be_shown(page, server, refused):
    tell(page, HOME)
    page.refusals.append("429")
    error = {"error": {"message": "too many requests at once"}}
    page.route(lambda url: "/v1/memory/" in url and refused in url, lambda route: route.fulfill(status=429, json=error))
    page.locator("#message").fill(BOAT)
    page.keyboard.press("Enter")
    page.get_by_text("This turn was kept, but its memory cannot be shown: too many requests at once").wait_for()
    page.wait_for_selector("#send:enabled")
    assert page.locator("#turns .user").all_inner_texts() == [HOME, BOAT]
    assert page.locator("#message").input_value() == ""
    assert page.locator("#status.error").count() == 1
    session = server.store.get(page.session_name)
    assert [turn.user for turn in server.store.transcript(session)] == [HOME, BOAT]
    page.unroute_all()
    tell(page, HOME)
    assert len(server.store.transcript(server.store.get(page.session_name))) == 3


def answers(page, *events):
    """Let every message be answered with these events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/v1/responses", lambda route: route.fulfill(content_type="text/event-stream", body=body))


HALF = {"type": "response.output_text.delta", "delta": "half a"}


@pytest.mark.parametrize(
    ("last", "said"),
    [([], "The reply broke off; this turn was not kept."), ([{"type": "error", "message": "it burns"}], "it burns")],
)
def test_a_reply_that_breaks_off_takes_its_turn_back(page, last, said):
    answers(page, HALF, *last)
    page.locator("#message").fill(BOAT)
    page.keyboard.press("Enter")
    page.get_by_text(said).wait_for()
    expect(page.locator("#turns li"), 0)
    assert page.locator("#message").input_value() == BOAT


@pytest.mark.parametrize("end", ["completed", "incomplete"])
def test_a_reply_that_ends_stays(page, end):
    answers(page, HALF, {"type": f"response.{end}"})
    assert tell(page, BOAT) == "half a"
    assert page.locator("#message").input_value() == ""


def no_map(page):
    """Why there is no map, as it is read out; it is to be seen, too."""
    said = page.locator("#map").get_attribute("aria-label")
    assert page.locator("#map-note").inner_text() == said
    return said


def test_without_a_map_it_is_said_why(page, monkeypatch):
    assert no_map(page) == "Nothing was said yet."
    tell(page, BOAT)
    assert page.locator("#map-note").inner_text().startswith("Rows are the slots")
    page.refusals.append("413")
    monkeypatch.setattr(memory_routes, "MOST_TRACED", len(HOME) - 1)
    tell(page, HOME)
    assert no_map(page) == f"There is no map of the last turn: at most {len(HOME) - 1} characters are traced at once."


def test_a_session_without_text(page, server_without_text):
    page.refusals.append("409")
    opened(page, server_without_text)
    reply = tell(page, BOAT)
    assert page.locator("#turns .user").inner_text() == BOAT and reply
    assert "the text of this session is not kept" in no_map(page)
    slots = page.locator("#slots li").count()
    assert slots and all(page.locator("#slots .words").all_inner_texts())

    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.locator("#turns .user").inner_text() == "(not kept)"
    assert page.locator("#turns .reply").text_content() == ""
    assert page.locator("#turns .forget").count() == 0
    assert "the text of this session is not kept" in no_map(page)
    assert page.locator("#slots li").count() == slots
    tell(page, BOAT)
    store = server_without_text.store
    said = store.transcript(store.get(page.session_name))
    assert [(turn.user, turn.reply) for turn in said] == [(None, None)] * 2
    page.get_by_role("button", name=f"Forget: {BOAT}").click()
    page.wait_for_selector("#turns li.faded")


def test_forget_empty_decay_fork_and_delete(page, server):
    tell(page, BOAT)
    tell(page, HOME)

    def strengths():
        session = server.store.get(page.locator("#session").input_value())
        return server.store.head(session).id

    state = strengths()
    page.get_by_role("button", name=f"Forget: {BOAT}").click()
    page.wait_for_selector("#turns li.faded")
    assert strengths() != state
    slots = page.locator("#slots li").count()
    page.locator("#slots button").first.click()
    expect(page.locator("#slots li"), slots - 1)
    state, strongest = strengths(), page.locator("#slots li span:nth-child(3)").first
    before = float(strongest.inner_text())
    page.get_by_role("button", name="Decay").click()
    page.get_by_text("The memory has faded").wait_for()
    assert strengths() != state
    assert float(strongest.inner_text()) == pytest.approx(0.9**10 * before, abs=0.02)  # after ten ticks
    page.get_by_role("button", name="Fork").click()
    page.get_by_text("now.").wait_for()
    fork = page.locator("#session").input_value()
    assert fork != page.session_name
    assert page.locator("#turns li").count() == 2
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted.").wait_for()
    names = [session.name for session in server.store.list()]
    assert fork not in names and page.session_name in names


def test_ephemeral_keeps_nothing(page, server):
    page.get_by_label("Ephemeral").check()
    page.get_by_text("nothing is kept").wait_for()
    page.locator("#message").fill(BOAT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    assert page.locator("#turns .reply").inner_text()
    assert page.get_by_role("button", name="Fork").is_disabled()
    nothing = page.get_by_text("An ephemeral chat keeps nothing between messages, so there is nothing to show here.")
    assert nothing.is_visible()
    assert not any(page.locator(part).is_visible() for part in ("#size", "#map", "#slots", "#map-note"))
    assert page.session_name not in [session.name for session in server.store.list()]
    page.get_by_label("Ephemeral").uncheck()
    expect(page.locator("#turns li"), 0)
    page.wait_for_selector("#size")
    assert not nothing.is_visible()


def test_what_is_said_is_text_and_never_markup(page):
    tell(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#turns .user").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.locator("#turns img, #turns b").count() == 0


@pytest.mark.looks(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
def test_at_phone_width_in_dark_mode_nothing_sticks_out(page):
    tell(page, BOAT)
    tell(page, "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150
    for name in ("Send", "Fork", "Decay"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_the_keyboard_reaches_everything_in_order(page):
    tell(page, BOAT)
    page.locator("#session").focus()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = ["ephemeral", "fork", "decay", "delete", "turns", "forget", "message", "send", "show-write", "show-read"]
    assert [name for name in seen if name in wanted] == wanted


def test_with_keys_the_page_asks_for_one(browser, loaded, tmp_path):
    with running(tmp_path / "s", loaded) as server:
        context = browser.new_context()
        page = context.new_page()
        opened(page, server)
        page.get_by_text("needs a valid API key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type(KEYS[0])
        page.keyboard.press("Enter")
        page.get_by_text("needs a valid API key").wait_for(state="hidden")
        tell(page, BOAT)
        assert [session.name for session in server.store.list(owner_of(KEYS[0]))] == ["page"]
        assert KEYS[0] not in page.content()
        context.close()


def test_the_page_asks_nobody_else(page, server):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    opened(page, server)
    assert len(asked) >= 4
    assert all(url.startswith((server.url, "data:")) for url in asked)


def test_whatever_of_the_page_is_served_has_its_policy(page, server):
    ask = page.context.request.get
    for path in ("/", "/page/page.js", "/page/page.css"):
        answer = ask(server.url + path)
        assert answer.status == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/index.html", "/page//index.html", "/page/", "/page/other.js"):
        answer = ask(server.url + path)
        assert (answer.status, answer.json()["error"]["message"]) == (404, "this server has no such route")
