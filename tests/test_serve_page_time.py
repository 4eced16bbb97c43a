"""What the page does when time passes, with the browser's clock in our hands: silence; and what it does in browsers
that lack or forbid something."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.serve import keys

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
        self.draws: list[dict[str, Any]] = []

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
            if '"draw"' in message:
                self.draws.append(json.loads(message))
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
            if self.page.evaluate("0") != 0 or self.passed != self.pongs:
                return False
            self.page.clock.run_for(500)
            return bool(self.page.evaluate(expression, argument))

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


def test_the_numbers_are_of_what_was_done_last(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, before=cable.lay)
    page.wait_for_selector(READY)
    assert [page.inner_text(f"#{name}") for name in ("latency", "device", "rate")] == ["–", "–", "–"]
    chip = page.locator("#chips button").first
    for number, act in enumerate(
        (
            lambda: page.fill("#prompt", "a star"),
            lambda: page.press("#prompt", "Enter"),
            lambda: page.click("#dice"),
            chip.click,
        ),
        1,
    ):
        cable.wait(30)
        before = page.evaluate("document.documentElement.dataset.shown || ''")
        act()
        cable.until("(before) => (document.documentElement.dataset.shown || '') !== before", before)
        value, unit = page.inner_text("#latency").split()
        assert 0 < float(value) * {"s": 1000, "ms": 1}[unit] < 10_000, f"action {number} took {value} {unit}"
        cable.wait(1)
        assert page.inner_text("#rate") == "0.2"
        cable.wait(5)
        assert page.inner_text("#rate") == "–"


def test_full_screen_by_its_button_which_works_in_a_kiosk_too(server: Running, page_of: Open) -> None:
    for path in ("/", "/?kiosk"):
        page = page_of(server, path)
        page.wait_for_selector(READY)
        for now in (True, False):
            page.click("#kiosk", delay=200)
            page.wait_for_function("(now) => (document.fullscreenElement !== null) === now", arg=now)
            page.wait_for_timeout(200)
            assert page.evaluate("document.fullscreenElement !== null") is now


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


NO_STORAGE = """for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name,
    { get() { throw new DOMException('Access is denied for this document.', 'SecurityError'); } });"""
FULL_STORAGE = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"


@pytest.mark.parametrize("script", [NO_STORAGE, FULL_STORAGE])
def test_a_browser_that_keeps_nothing_draws_and_remembers_until_the_page_is_closed(
    tmp_path: Path, page_of: Open, script: str
) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    cable = Cable()

    def before(page: Any) -> None:
        cable.lay(page)
        page.add_init_script(script)

    with running(tmp_path / "data", api_keys=file) as server:
        page = page_of(server, before=before)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector(READY)
        page.fill("#prompt", "a star")
        cable.until(SHOWN, "a star")
        for theme in ("dark", "light", "as the system"):
            page.click("#theme")
            assert page.get_attribute("#theme", "aria-label") == f"Theme: {theme}"
        page.evaluate("dispatchEvent(new Event('offline'))")
        assert cable.status == LOST
        cable.until(f"document.querySelector('{READY}') !== null")  # with the key that it was given
