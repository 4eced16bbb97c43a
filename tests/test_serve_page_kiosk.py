"""A page that stands somewhere for everybody: it draws by itself, lets who touches it alone, and fills the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running
from .test_serve_page import READY
from .test_serve_page_time import LOST, SHOWN, Cable

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("kiosk")) as server:
        yield server


def test_a_kiosk_leaves_who_touches_it_alone_for_twenty_seconds(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, "/?kiosk", before=cable.lay)
    page.wait_for_selector(READY)
    cable.wait(2)
    assert page.input_value("#prompt") == ""
    for touch in (lambda: page.mouse.click(5, 400), lambda: page.keyboard.press("Shift")):
        cable.wait(8)
        assert page.input_value("#prompt") not in ("", "a visitor's")  # it draws by itself
        touch()
        cable.wait(1)
        page.fill("#prompt", "a visitor's")
        cable.wait(17)
        assert page.input_value("#prompt") == "a visitor's"


def test_a_kiosk_goes_from_text_to_text_and_waits_two_minutes_for_a_picture(tmp_path: Path, page_of: Open) -> None:
    gate, cable = Gate(), Cable()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server:
        page = page_of(server, "/?kiosk", before=cable.lay)
        page.wait_for_selector(READY)
        texts = page.evaluate("[...document.querySelectorAll('#chips button')].map((chip) => chip.textContent)")
        assert len(set(texts)) == 6
        cable.wait(10)
        assert page.input_value("#prompt") == texts[0]
        cable.wait(110)  # its picture does not come
        assert page.input_value("#prompt") == texts[0]
        cable.wait(20)
        assert page.input_value("#prompt") == texts[1]
        gate.let(1000)
        for text in [*texts[1:], texts[0]]:  # now they come
            cable.until(SHOWN, text)
            cable.wait(3)  # there is time to look at it
            assert page.input_value("#prompt") == text
            cable.wait(2)
            assert page.input_value("#prompt") != text


def letters(cable: Cable, most: int) -> list[str]:
    """What stands in the prompt after each 45 ms, for as long as that changes."""
    seen: list[str] = []
    for _ in range(most):
        cable.page.clock.run_for(45)
        text = cable.page.input_value("#prompt")
        if text not in seen[-1:]:
            seen.append(text)
    return seen


def test_a_kiosk_types_letter_by_letter_and_draws_at_each_word(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, "/?kiosk", before=cable.lay)
    page.wait_for_selector(READY)
    text = page.inner_text("#chips button")
    cable.page.clock.run_for(3000)
    assert page.input_value("#prompt") == text[0]
    assert letters(cable, len(text) + 2) == [text[:end] for end in range(1, len(text) + 1)][1:]
    cable.until(SHOWN, text)
    words = text.split()
    assert [draw["prompt"] for draw in cable.draws] == [" ".join(words[:n]) for n in range(1, len(words) + 1)]
    *first, last = [draw["seed"] for draw in cable.draws]
    assert set(first) == {7} and last != 7  # the whole text is drawn with another seed each time


def test_a_kiosk_lets_go_at_once_of_who_touches_it_while_it_types(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, "/?kiosk", before=cable.lay)
    page.wait_for_selector(READY)
    cable.page.clock.run_for(3000)
    letters(cable, 12)
    draws = len(cable.draws)
    page.keyboard.press("Shift")
    typed = page.input_value("#prompt")
    cable.wait(15)
    assert page.input_value("#prompt") == typed != page.inner_text("#chips button")
    assert len(cable.draws) == draws > 0


def test_a_kiosk_types_nothing_while_nothing_can_be_drawn(
    tmp_path: Path, page_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cable = Cable()
    with running(tmp_path) as server:
        page = page_of(server, "/?kiosk", before=cable.lay)
        page.wait_for_selector(READY)
        cable.pulled = True
        page.evaluate("dispatchEvent(new Event('offline'))")
        cable.wait(10)
        assert (cable.status, page.input_value("#prompt")) == (LOST, "")
        cable.pulled = False
        cable.wait(35)
        cable.until("document.querySelector('#prompt').value !== ''")
        monkeypatch.setattr("vega_edge.serve.live.live_models", lambda entries: [])
        none = page_of(server, "/?kiosk", before=Cable().lay)
        none.wait_for_selector('#status[data-state="fault"]')
        none.clock.run_for(10000)
        assert (none.inner_text("#status"), none.input_value("#prompt")) == ("No model has a bundle here", "")


def test_a_kiosk_asks_for_full_screen_when_a_browser_grants_it(server: Running, page_of: Open) -> None:
    """The HTML standard's activation triggering events: a mouse that is pressed, a key, a finger that is lifted."""
    heard = """window.heard = []; Element.prototype.requestFullscreen = () => {
        heard.push(event.type + ' ' + (event.pointerType ?? event.key)); return Promise.reject(Error('not now')); };"""
    page = page_of(server, "/?kiosk", before=lambda page: page.add_init_script(heard), has_touch=True)
    page.wait_for_selector(READY)
    page.touchscreen.tap(5, 400)
    page.mouse.click(5, 400)
    page.keyboard.press("Shift")
    assert {"pointerup touch", "pointerdown mouse", "keydown Shift"} <= set(page.evaluate("heard"))
    let_go = "document.dispatchEvent(new PointerEvent('pointerup', { bubbles: true, pointerType: 'outside' }))"
    page.evaluate(let_go)  # as Firefox does for a button that is let go outside its window
    assert "pointerup outside" in page.evaluate("heard")
    page.evaluate("Object.defineProperty(document, 'fullscreenElement', { value: document.body }); heard.length = 0;")
    page.mouse.click(5, 400)
    assert page.evaluate("heard") == []  # it is full screen already


def test_a_kiosk_keeps_the_screen_awake_again_after_it_was_hidden(server: Running, page_of: Open) -> None:
    """Screen Wake Lock (W3C), 8.2: a lock ends when its page is hidden, and nobody takes it again but the page."""
    cable = Cable()
    asked = """window.locks = []; Object.defineProperty(Navigator.prototype, 'wakeLock', { value: { request(what) {
        locks.push(what); return locks.length === 1 ? Promise.resolve() : Promise.reject(Error('battery low')); } } });"""

    def before(page: Any) -> None:
        cable.lay(page)
        page.add_init_script(asked)

    def turn(page: Any, state: str) -> list[str]:
        page.evaluate(
            """(state) => { Object.defineProperty(document, 'visibilityState', { value: state, configurable: true });
            document.dispatchEvent(new Event('visibilitychange')); }""",
            state,
        )
        return list(page.evaluate("locks"))

    page = page_of(server, "/?kiosk", before=before)
    page.wait_for_selector(READY)
    assert page.evaluate("locks") == ["screen"]
    assert turn(page, "hidden") == ["screen"]
    cable.wait(5)
    for locks in (2, 3):  # also after one that was refused
        assert turn(page, "visible") == ["screen"] * locks
        assert turn(page, "hidden") == ["screen"] * locks
    plain = page_of(server, before=before)
    plain.wait_for_selector(READY)
    assert turn(plain, "visible") == []
