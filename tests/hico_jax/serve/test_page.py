"""The page in a real Chromium: upload, ask, stream, go to what was attended to; by keyboard, and on a phone.

Skips where Playwright or a Chromium is missing: pip install -e '.[browser]', and a browser such as Debian's `chromium`.
HICO_SCREENSHOTS=DIR keeps pictures.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hico_jax
from benchmarks import serve_rig
from hico_jax.api import Model
from hico_jax.evals import needle
from tests.hico_jax.serve.test_app import Served

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -e '.[browser]')"
)
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def served(make_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(make_model(), tmp_path_factory.mktemp("uploads"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


# Ten thousand frames, as the page would draw them.
LONG = """
state.timeline = {frames: 10000, times: [...Array(10000).keys()], frames_per_clip: 4, duration_s: 10000, read_s: 0,
                  encode_s: 0};
document.getElementById("film").hidden = false;
draw(null);
"""


def until(page: Any, expression: str, seconds: float = 30.0) -> None:
    """Ask the page again and again; its own policy forbids Playwright's way, which makes code of text inside it."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def shot(page: Any, name: str) -> None:
    if folder := os.environ.get("HICO_SCREENSHOTS"):
        page.screenshot(path=str(pathlib.Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("phone", [False, True])
def test_a_film_is_asked_about(phone: bool, browser: Any, served: Served, films: list[pathlib.Path]) -> None:
    size = {"width": 375, "height": 700} if phone else {"width": 1000, "height": 900}
    context = browser.new_context(viewport=size, has_touch=phone, is_mobile=phone)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    page.set_input_files("#file", films[0])
    page.get_by_text("1.mp4 is ready").wait_for(timeout=20_000)
    marks = page.locator("#line button")
    assert marks.count() == 3  # clips
    assert "12 frames of 0:12 were seen" in page.locator("#seen").inner_text()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("What is <b>seen</b>?")
    page.keyboard.press("Enter")
    page.locator("#figures", has_text="tokens/s").wait_for(timeout=60_000)
    mine, answer = page.locator("#talk p").all_inner_texts()
    seen = served.model.watch(films[0])
    assert mine == "What is <b>seen</b>?"  # as text, not as markup
    assert page.locator("#talk b").count() == 0
    chat = served.model.chat(seen)
    assert (
        " ".join(answer.split())
        == " ".join(chat.say("What is <b>seen</b>?").text.split())[: len(" ".join(answer.split()))]
    )
    looked = page.locator("#looked button")
    assert looked.count() == 3
    last = looked.nth(2)
    last.focus()
    page.keyboard.press("Enter")
    until(page, "document.getElementById('video').currentTime === 8")
    marks.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('video').currentTime === 4")
    page.fill("#question", "And then?")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#talk p').length === 4 && !document.getElementById('send').disabled")
    assert "reused" in page.locator("#figures").inner_text()
    wide = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert wide, "the page is wider than the screen"
    shot(page, "phone" if phone else "page")
    assert faults == []
    context.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_mistakes_are_said_on_the_page(
    browser: Any, served: Served, films: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    page = browser.new_page()
    page.goto(served.url)
    (tmp_path / "notes.mp4").write_text("only words")
    page.set_input_files("#file", tmp_path / "notes.mp4")
    page.get_by_text("this is a text file, not a film").wait_for(timeout=10_000)
    (tmp_path / "broken.mp4").write_bytes(films[0].read_bytes()[:400])
    page.set_input_files("#file", tmp_path / "broken.mp4")
    page.locator("#state", has_text="broken.mp4: ").wait_for(timeout=20_000)
    assert page.evaluate("state.file") is None  # or every question would be about a film that cannot be read
    page.evaluate(LONG)
    edge = "Math.round(document.getElementById('line').{}.getBoundingClientRect().right)"
    assert page.evaluate(edge.format("lastElementChild")) <= page.evaluate(edge.format("parentElement"))
    page.fill("#question", "long " * 400)
    page.keyboard.press("Enter")
    page.locator("#talk p.bad", has_text="tokens longer than the 512").wait_for(timeout=10_000)
    page.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_another_film_ends_what_is_said_about_the_first(
    browser: Any, served: Served, films: list[pathlib.Path]
) -> None:
    page = browser.new_page()
    page.goto(served.url)
    page.set_input_files("#file", films[0])
    page.get_by_text("1.mp4 is ready").wait_for(timeout=20_000)
    held = served.engine.call(lambda: time.sleep(1.0))
    page.fill("#question", "What is seen?")
    page.keyboard.press("Enter")
    page.set_input_files("#file", films[1])
    page.get_by_text("2.mp4 is ready").wait_for(timeout=20_000)
    held.result(10)
    until(page, "document.querySelectorAll('#talk p').length === 0 && !document.getElementById('send').disabled")
    page.keyboard.type("And here?")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#talk p').length === 2 && !document.getElementById('send').disabled")
    assert page.evaluate("state.history.length") == 2  # the first question is not part of this talk
    assert page.locator("#talk p.bad").count() == 0
    page.close()


SHIPPED = pathlib.Path(hico_jax.__file__).parent / "weights" / "nano"


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED.is_dir(), reason="this checkout has no weights")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_shipped_model_answers_on_the_page(browser: Any, tmp_path: pathlib.Path) -> None:
    """What docs/serve shows: HICO_SCREENSHOTS=docs/serve keeps the pictures."""
    hidden = needle.hide(tmp_path, 96, 0.62, 90_000)
    film = pathlib.Path(hidden.film.path).rename(tmp_path / "film.mp4")
    card = hidden.film.scene.cards[0]
    rig = serve_rig.Rig(hico_jax.load("nano"), tmp_path / "work", buckets=((1, 2304),), name="nano")
    try:
        for phone in (False, True):
            size = {"width": 375, "height": 700} if phone else {"width": 1000, "height": 900}
            context = browser.new_context(viewport=size, has_touch=phone, is_mobile=phone)
            page = context.new_page()
            page.goto(rig.url.removesuffix("v1"))
            page.set_input_files("#file", film)
            page.get_by_text("film.mp4 is ready").wait_for(timeout=300_000)
            for question in ("What shape is on the card?", "What colour is the card?"):
                page.fill("#question", question)
                page.keyboard.press("Enter")
                until(page, "!document.getElementById('send').disabled", 300)
            _, shape, _, colour = page.locator("#talk p").all_inner_texts()
            assert (shape, colour) == (card.content, card.colour)
            weights = [
                float(b.get_attribute("title").split("; ")[1].split()[0]) for b in page.locator("#line button").all()
            ]
            most = weights.index(max(weights))
            page.locator("#line button").nth(most).click()
            page.wait_for_timeout(2000)  # pictures of the clips are painted
            shot(page, "phone" if phone else "page")
            assert len(weights) == 24
            assert card.start_s - 3 <= 4 * most <= card.end_s  # it looked at the card
            assert 95 < sum(weights) < 105  # rounded to tenths
            context.close()
    finally:
        rig.close()
