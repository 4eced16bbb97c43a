"""What the page does when time passes, with the browser's clock in our hands: silence, a kiosk left alone; full screen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until
from .test_serve_page import READY, drawn

Open = Callable[..., Any]
SHOWN = "(text) => document.querySelector('#frame-a img').alt === text"
LOST = "Connection lost. Trying again…"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("time")) as server:
        yield server


class Cable:
    """The page's way to the server and its clock. pulled: nothing comes through, and nobody is told."""

    def __init__(self, pulled: bool = False) -> None:
        self.pulled, self.connections = pulled, 0
        self.pings, self.passed, self.pongs = 0, 0, 0

    def lay(self, page: Any) -> None:
        self.page = page
        page.clock.install(time=0)
        page.clock.pause_at(1)
        page.route_web_socket(re.compile("/live$"), self._connect)

    def _connect(self, page: Any) -> None:
        server = page.connect_to_server()
        self.connections += 1

        def up(message: Any) -> None:
            self.pings += '"ping"' in message
            if not self.pulled:
                self.passed += '"ping"' in message
                server.send(message)

        def down(message: Any) -> None:
            self.pongs += message == '{"type":"pong"}'
            if not self.pulled:
                page.send(message)

        page.on_message(up)
        server.on_message(down)

    def wait(self, seconds: int) -> None:
        """Lets time pass on the page, which otherwise stands still, no faster than its pings are answered."""
        for _ in range(seconds):
            self.page.clock.run_for(1000)
            wait_until(lambda: self.page.evaluate("0") == 0 and self.passed == self.pongs)

    def until(self, expression: str, argument: Any = None) -> None:
        def true() -> bool:
            self.page.clock.run_for(500)
            return bool(self.page.evaluate(expression, argument)) and self.passed == self.pongs

        wait_until(true)

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status"))


def test_a_server_that_says_nothing_any_more_is_noticed_and_healed(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, before=cable.lay)
    page.wait_for_selector(READY)
    cable.wait(45)
    assert (cable.connections, cable.status) == (1, "Ready") and cable.pings >= 4  # answers keep it
    cable.pulled = True
    pings = cable.pings
    cable.wait(19)  # it is asked within 10 s, and has 20 s to answer
    assert cable.pings == pings + 1 and cable.status != LOST
    page.fill("#prompt", "typed in silence")
    assert cable.connections == 1
    cable.wait(12)
    assert cable.status == LOST
    cable.pulled = False
    cable.wait(35)  # the attempts in between have met the same silence
    cable.until(SHOWN, "typed in silence")
    assert cable.status == "Ready"


def test_a_server_that_never_says_anything_is_noticed_too(server: Running, page_of: Open) -> None:
    cable = Cable(pulled=True)
    page = page_of(server, before=cable.lay)
    cable.wait(18)
    assert cable.status == "Connecting…"
    assert cable.connections == 1
    cable.wait(13)
    assert cable.connections > 1 and cable.status == LOST
    cable.pulled = False
    cable.wait(35)
    page.wait_for_selector(READY)


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
        cable.wait(10)
        assert page.input_value("#prompt") == texts[0]
        cable.wait(110)  # its picture does not come
        assert page.input_value("#prompt") == texts[0]
        cable.wait(20)
        assert page.input_value("#prompt") == texts[1]
        gate.let(1000)
        for text in texts[1:4]:  # now they come
            cable.until(SHOWN, text)


def test_full_screen_by_its_button_which_works_in_a_kiosk_too(server: Running, page_of: Open) -> None:
    for path in ("/", "/?kiosk"):
        page = page_of(server, path)
        page.wait_for_selector(READY)
        for now in (True, False):
            page.click("#kiosk", delay=200)
            page.wait_for_function("(now) => (document.fullscreenElement !== null) === now", arg=now)
            page.wait_for_timeout(200)
            assert page.evaluate("document.fullscreenElement !== null") is now


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


@pytest.mark.parametrize("path", ["/", "/?kiosk"])
def test_a_browser_without_full_screen_and_wake_lock_draws_all_the_same(
    server: Running, page_of: Open, path: str
) -> None:
    lacking = "delete Element.prototype.requestFullscreen; delete Navigator.prototype.wakeLock;"
    page = page_of(server, path, before=lambda page: page.add_init_script(lacking), has_touch=True)
    page.wait_for_selector(READY)
    assert page.evaluate("!document.documentElement.requestFullscreen && !navigator.wakeLock")
    assert not page.is_visible("#kiosk")
    text = page.inner_text("#chips button")
    assert drawn(page, lambda: page.tap("#chips button"))["alt"] == text
