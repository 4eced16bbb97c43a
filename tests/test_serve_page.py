"""The live page in a real browser, headless: typing, keyboard, faults, lost connections, keys, kiosk, sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import EngineError
from vega_edge.serve import keys

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def before(request: Any, index: int) -> None:
        if request.prompt == "fail":
            raise EngineError("the engine failed")

    with running(tmp_path_factory.mktemp("page"), FakeDrawer(before_step=before)) as server:
        yield server


Open = Callable[..., Any]


def drawn(page: Any, act: Callable[[], Any]) -> dict[str, Any]:
    """Does something and waits for the picture that comes of it; what the caption says."""
    before = page.evaluate("document.documentElement.dataset.shown || ''")
    act()
    page.wait_for_function("before => (document.documentElement.dataset.shown || '') !== before", arg=before)
    page.wait_for_selector('#status[data-state="ready"]')
    return {"caption": page.inner_text("#frame-a figcaption"), "alt": page.get_attribute("#frame-a img", "alt")}


def test_the_page_draws_while_you_type(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector('#status[data-state="ready"]')
    got = drawn(page, lambda: page.type("#prompt", "a star"))
    page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'a star'")
    assert page.evaluate("document.querySelector('#frame-a img').naturalWidth") == 128
    assert got["caption"] == "LCM, 4 steps, seed 7, 128 × 128"
    assert page.inner_text("#latency").endswith(("ms", "s")) and page.inner_text("#rate") != ""


def test_the_page_works_by_keyboard_alone(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector('#status[data-state="ready"]')
    drawn(page, lambda: page.keyboard.type("a star"))  # the prompt has the focus
    page.keyboard.press("Tab")
    assert drawn(page, lambda: page.keyboard.type("5"))["caption"].startswith("LCM, 4 steps, seed ")
    page.keyboard.press("Tab")
    seed = page.input_value("#seed")
    drawn(page, lambda: page.keyboard.press("Enter"))  # the dice
    assert page.input_value("#seed") != seed
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_attribute("#lock", "aria-pressed") == "false"
    page.focus("#prompt")
    seed = page.input_value("#seed")
    drawn(page, lambda: page.keyboard.press("Enter"))  # not locked: another seed
    assert page.input_value("#seed") != seed


def test_every_control_has_a_name(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector('#status[data-state="ready"]')
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), select, textarea, a, summary')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.get_attribute("#said", "role") == "status"


def test_parameters_history_compare_and_download(server: Running, page_of: Open) -> None:
    page = page_of(server, accept_downloads=True)
    page.wait_for_selector('#status[data-state="ready"]')
    drawn(page, lambda: page.fill("#prompt", "a red house"))
    page.wait_for_selector("#history li")
    drawn(page, lambda: page.select_option("#scheduler", "Euler a"))
    got = drawn(page, lambda: page.fill("#steps", "6"))
    assert got["caption"] == "Euler a, 6 steps, seed 7, 128 × 128"
    drawn(page, lambda: page.select_option("#size", "192x128"))
    assert page.evaluate("document.querySelector('#frame-a img').naturalHeight") == 128
    drawn(page, lambda: page.click("#history li:last-child button"))
    assert (page.input_value("#steps"), page.input_value("#size"), page.input_value("#scheduler")) == (
        "4",
        "128x128",
        "",
    )
    page.select_option("#compare", "seed")
    page.wait_for_function("() => document.querySelector('#frame-b figcaption').textContent.includes('seed 8')")
    page.select_option("#compare", "")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a-red-house-7.jpg"
    image = Image.open(download.value.path())
    comment = image.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert comment.startswith("a red house\nSteps: 4")


def test_a_fault_is_said_plainly(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector('#status[data-state="ready"]')
    page.fill("#prompt", "fail")
    page.wait_for_selector("figcaption.fault")
    assert page.inner_text("#frame-a figcaption") == "the engine failed"
    assert page.text_content("#said") == "Not drawn: the engine failed"
    drawn(page, lambda: page.fill("#prompt", "a star"))
    assert "fault" not in (page.get_attribute("#frame-a figcaption", "class") or "")


def test_a_lost_connection_is_said_and_heals(tmp_path: Path, page_of: Open) -> None:
    port = None
    with running(tmp_path) as server:
        port = server.service.settings.port
        page = page_of(server)
        page.wait_for_selector('#status[data-state="ready"]')
        drawn(page, lambda: page.fill("#prompt", "a star"))
    page.wait_for_selector('#status[data-state="lost"]')
    assert page.inner_text("#status") == "Connection lost. Trying again…"
    page.fill("#prompt", "typed while it was away")
    with running(tmp_path, port=port):
        page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'typed while it was away'")


def test_the_page_asks_for_a_key(tmp_path: Path, page_of: Open) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file) as server:
        page = page_of(server)
        page.wait_for_selector("#key-dialog[open]")
        for _ in range(3):  # Chromium closes a dialog on the second Escape whatever the page says
            page.keyboard.press("Escape")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "SG_wrong")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('#key-fault').textContent.startsWith('Unauthorized')")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector('#status[data-state="ready"]')
        drawn(page, lambda: page.fill("#prompt", "a star"))


def test_a_kiosk_draws_by_itself(server: Running, page_of: Open) -> None:
    page = page_of(server, "/?kiosk", viewport={"width": 1080, "height": 1920})
    page.wait_for_function("() => document.documentElement.dataset.shown", timeout=60000)
    assert page.input_value("#prompt") != ""
    assert not page.is_visible("#panel") and page.is_visible("#dice")
    assert (
        page.evaluate(
            "Math.min(...[...document.querySelectorAll('#chips button, #dice')].map(b => b.getBoundingClientRect().height))"
        )
        >= 44
    )


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1440, 900), (3840, 2160)])
def test_nothing_sticks_out_from_phone_to_4k(server: Running, page_of: Open, width: int, height: int) -> None:
    for scheme in ("dark", "light"):
        page = page_of(server, viewport={"width": width, "height": height}, color_scheme=scheme)
        page.wait_for_selector('#status[data-state="ready"]')
        drawn(page, lambda page=page: page.fill("#prompt", "a star"))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        box = page.locator("#frame-a .canvas").bounding_box()
        assert box["width"] >= 0.25 * width and box["x"] >= 0 and box["y"] + box["height"] <= height


def test_the_docs_are_there_without_a_network(server: Running, page_of: Open) -> None:
    page = page_of(server, "/docs")
    page.wait_for_selector("summary")
    assert page.locator("summary code", has_text="/v1/segmind-vega").count() == 3
    page.locator("summary").first.click()
    time.sleep(0.1)


READY = '#status[data-state="ready"]'


def test_a_reload_has_the_settings_of_the_model_that_it_remembers(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector(READY)
    page.evaluate("localStorage.setItem('model', 'demo-vegart')")
    page.evaluate("document.querySelector('#steps').value = 9")
    page.reload()
    page.wait_for_selector(READY)
    assert (page.input_value("#steps"), page.input_value("#size")) == ("4", "128x128")


def test_settings_in_the_address(server: Running, page_of: Open) -> None:
    page = page_of(server, "/?kiosk&model=demo-vegart&size=192x192&steps=6&scheduler=Euler")
    page.wait_for_selector(READY)
    values = [page.input_value(f"#{name}") for name in ("model", "size", "steps", "scheduler")]
    assert values == ["demo-vegart", "192x192", "6", "Euler"]
    wrong = page_of(server, "/?size=5x5")
    wrong.wait_for_selector('#status[data-state="fault"]')
    assert wrong.inner_text("#status") == "size in the address can't be 5x5"


@pytest.mark.parametrize(
    ("setting", "value"), [("model", "nope"), ("size", "999x1"), ("scheduler", "zzz"), ("steps", "999")]
)
def test_what_the_address_can_not_have_is_said_until_something_is_chosen(
    server: Running, page_of: Open, setting: str, value: str
) -> None:
    page, said = page_of(server, f"/?{setting}={value}"), f"{setting} in the address can't be {value}"
    page.wait_for_selector('#status[data-state="fault"]')
    assert page.inner_text("#status") == said
    drawn(page, lambda: page.fill("#prompt", "a star"))
    assert page.inner_text("#status") == said
    drawn(page, lambda: page.select_option("#scheduler", "Euler"))
    assert page.inner_text("#status") == "Ready"


def test_a_model_may_be_called_by_its_alias_in_the_address(server: Running, page_of: Open) -> None:
    page = page_of(server, "/?model=segmind-vega&steps=6")
    page.wait_for_selector(READY)
    assert (page.input_value("#model"), page.input_value("#steps")) == ("demo-vegart", "6")


def test_many_keys_are_few_requests_and_the_last_one_counts(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector(READY)
    sent = page.evaluate(
        """() => {
        let sent = 0;
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (data) { sent += data.includes('"draw"'); send.call(this, data); };
        const prompt = document.querySelector('#prompt');
        for (let i = 0; i < 40; i++) { prompt.value = `star ${i}`; prompt.dispatchEvent(new Event('input', { bubbles: true })); }
        return new Promise((done) => setTimeout(() => done(sent), 500));
    }"""
    )
    assert 1 <= sent <= 3
    page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'star 39'")
    page.wait_for_function("() => document.querySelector('#said').textContent === 'Picture drawn'")


def test_an_emptied_prompt_and_an_ended_comparison_stop_what_is_drawn(tmp_path: Path, page_of: Open) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        page = page_of(server)
        page.wait_for_selector(READY)
        page.fill("#prompt", "a star")
        gate.wait()
        (walk,) = server.service.worker._walks.values()
        page.fill("#prompt", "")
        wait_until(lambda: walk.jobs[0].cancelled)
        page.wait_for_selector(READY)
        page.select_option("#compare", "seed")
        page.fill("#prompt", "a star")
        gate.let(1)
        wait_until(lambda: server.service.worker.waiting == 1)
        (second,) = server.service.worker._lines["live"].in_order()
        page.select_option("#compare", "")
        wait_until(lambda: second.cancelled)
        gate.let(50)
        page.wait_for_selector(READY)


def test_a_rate_that_is_reached_is_said_and_heals(tmp_path: Path, page_of: Open) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file, rate=10) as server:
        page = page_of(server)
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector(READY)
        while not server.service.rate.take("page"):
            pass
        page.fill("#prompt", "a star")
        page.wait_for_selector("figcaption.fault")
        assert page.inner_text("#frame-a figcaption").startswith("more than 10 pictures a minute; try again in ")
        page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'a star'")


def test_a_connection_that_went_silent_is_lost_and_heals(server: Running, page_of: Open) -> None:
    page = page_of(server)
    page.wait_for_selector(READY)
    page.evaluate("window.dispatchEvent(new Event('offline'))")
    assert page.inner_text("#status") == "Connection lost. Trying again…"
    page.wait_for_selector(READY)


def test_fingers_have_room_and_equal_pictures_are_kept_once(server: Running, page_of: Open) -> None:
    page = page_of(server, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    page.wait_for_selector(READY)
    low = page.evaluate("""[...document.querySelectorAll('button, select, summary, .quiet')]
        .filter(e => e.offsetParent && e.getBoundingClientRect().height < 44).map(e => e.id || e.className)""")
    assert low == []
    assert page.get_attribute("#panel", "open") is None  # the picture has its room; the settings are a touch away
    drawn(page, lambda: page.fill("#prompt", "a star"))
    page.wait_for_selector("#history li")
    drawn(page, lambda: page.click("#history li button"))
    time.sleep(1.0)
    assert page.locator("#history li").count() == 1
