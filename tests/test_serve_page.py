"""The chat page, in headless Chromium. With OSSCOMPILE_PICTURES=DIR it leaves screenshots there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import FINAL, ScriptedEngine, serving, serving_script, wait_until

from osscompile.runtime import Engine
from osscompile.runtime.serve.app import PAGE, make_app
from osscompile.runtime.serve.service import make_service

pytest.importorskip("websockets")
from browser import CHROMIUM, Page, browsing

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
PICTURES = os.environ.get("OSSCOMPILE_PICTURES")
IDLE = "document.getElementById('send').textContent === 'Send'"


@pytest.fixture(scope="module")
def nano(nano_artifact: Path) -> Iterator[str]:
    with (
        Engine(nano_artifact) as engine,
        serving(make_app(make_service(engine, "nano", 100))) as url,
    ):
        yield url


@pytest.fixture
def page(nano: str, tmp_path: Path) -> Iterator[Page]:
    with browsing(nano, tmp_path / "profile") as page:
        page.wait("document.getElementById('model').textContent === 'nano'")
        yield page
        assert not page.errors


def ask(page: Page, text: str) -> None:
    """By keyboard alone: the field has the focus."""
    page.type(text)
    page.press("Enter")
    page.wait(f"!document.querySelector('textarea').value && {IDLE}")


def texts(page: Page) -> list[str]:
    return page.run("[...document.querySelectorAll('article > .text')].map(t => t.textContent)")


def click(page: Page, label: str) -> None:
    page.run(f"[...document.querySelectorAll('[aria-label=\"{label}\"]')].at(-1).click()")


def picture(page: Page, name: str) -> None:
    if PICTURES is not None:
        page.picture(Path(PICTURES) / f"{name}.png")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:,)|@import|url\(|https?:""", text)


@needs_chromium
def test_a_conversation_that_branches(page: Page) -> None:
    ask(page, "What is 17 + 25?")
    ask(page, "What is 2 + 2?")
    said = texts(page)
    assert said[0::2] == ["What is 17 + 25?", "What is 2 + 2?"]
    assert page.run("document.querySelectorAll('details:not([hidden])').length") == 2
    assert not page.run("document.querySelector('details').open")
    assert re.search(r"\d+ tokens, [\d.]+ a second", page.run("document.body.innerText"))
    picture(page, "wide")
    page.run("document.querySelectorAll('[aria-label=\"Edit this message\"]')[0].click()")
    page.run("document.activeElement.select()")
    page.type("What is 3 + 4?")
    picture(page, "edit")
    page.press("Enter")
    page.wait(IDLE)
    assert texts(page)[0] == "What is 3 + 4?" and len(texts(page)) == 2
    picture(page, "branch")
    page.run("document.querySelector('[aria-label=\"Previous version\"]').click()")
    assert texts(page) == said
    click(page, "Answer again")
    page.wait(f"{IDLE} && document.body.innerText.includes('2/2')")
    assert len(texts(page)) == 4


@needs_chromium
def test_a_schema_that_is_no_json_is_told(page: Page) -> None:
    page.run("document.getElementById('more').click()")
    page.run("document.getElementById('schema').value = '{'")
    page.run("document.getElementById('question').focus()")
    ask(page, "Anna is 7 years old, lives in Paris and likes red.")
    picture(page, "error")
    error = "document.querySelector('.error:not(:empty)')"
    assert "The schema is no JSON" in page.run(f"{error}.textContent")
    (top, bottom), (chat_top, chat_bottom) = (
        page.run(f"(r => [r.top, r.bottom])({box}.getBoundingClientRect())")
        for box in (error, "document.getElementById('scroll')")
    )
    assert chat_top <= top and bottom <= chat_bottom  # it is seen, beside the settings


@needs_chromium
def test_an_answer_of_a_proxy_between_is_no_fault_of_the_schema(page: Page) -> None:
    page.run("window.fetch = async () => new Response('<html>', {status: 502})")
    ask(page, "What is 17 + 25?")
    told = page.run("document.querySelector('.error:not(:empty)').textContent")
    assert told == "The server answered 502."


@needs_chromium
def test_the_page_at_the_width_of_a_phone(page: Page) -> None:
    page.resize(360, 640)
    page.dark(True)
    ask(page, "What is 17 + 25?" + "x" * 200)
    for settings in (False, True):
        if settings:
            page.run("document.getElementById('more').click()")
        picture(page, f"phone-{settings}")
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.run("document.getElementById('send').getBoundingClientRect().bottom") <= 640


@needs_chromium
def test_an_answer_is_told_as_it_comes_and_stops(tmp_path: Path) -> None:
    said = "<b>one</b> " * 400
    engine = ScriptedEngine(f"{FINAL}{said}<|return|>", seconds=0.005)
    with serving_script(engine) as url, browsing(url, tmp_path) as page:
        page.wait("document.getElementById('model').textContent === 'scripted'")
        page.type("Go")
        page.press("Enter")
        page.wait("document.body.innerText.includes('<b>one</b> <b>one')")  # text, and no markup
        picture(page, "streams")
        page.press("Escape")
        page.wait(IDLE)
        assert "Stopped." in page.run("document.body.innerText")
        assert len(texts(page)[1]) < len(said)
        wait_until(lambda: engine.requests[0].cancelled)
        assert not page.errors


@needs_chromium
def test_a_server_with_a_key_asks_for_it(tmp_path: Path) -> None:
    with (
        serving_script(ScriptedEngine(), api_key="secret") as url,
        browsing(url, tmp_path) as page,
    ):
        page.wait("document.activeElement.id === 'key'")
        page.type("secret")
        page.press("Tab")
        page.wait("document.getElementById('model').textContent === 'scripted'")
        page.run("document.getElementById('question').focus()")
        ask(page, "Hello")
        assert texts(page) == ["Hello", "Yes."]
