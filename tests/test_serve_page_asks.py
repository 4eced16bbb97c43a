"""What the page sends and how it takes the answers, with a server that is made up: settings come back from the history,
keys and files keep what they need."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge import serve
from vega_edge.serve import keys
from vega_edge.serve.live_messages import binary

from .serve_running import running, wait_until
from .test_serve_page import READY, drawn
from .test_serve_page_time import LOST

Open = Callable[..., Any]


def model(name: str, steps: int, guidance: float, most_guidance: float, most_px: int) -> dict[str, Any]:
    side = {"minimum": 64, "maximum": most_px, "default": 128}
    return {
        "name": name,
        "title": f"the {name} one",
        "parameters": {
            "num_inference_steps": {"minimum": 1, "maximum": 50, "default": steps},
            "guidance_scale": {"minimum": 0, "maximum": most_guidance, "default": guidance},
            "img_width": side,
            "img_height": side,
        },
    }


class Invented:
    """A server with two models that draws at once, unless it is `mute`, or `away`; `draws` are the requests that it got."""

    MODELS = (model("quick", 4, 0, 1, 128), model("guided", 20, 7.5, 20, 256))

    def __init__(self) -> None:
        self.draws: list[dict[str, Any]] = []
        self.stops: list[str] = []
        self.mute = self.away = False
        self.adjusted: list[str] = []
        self.connections = 0

    def lay(self, page: Any) -> None:
        page.route_web_socket(re.compile("/live$"), self._connect)

    def _connect(self, socket: Any) -> None:
        self.socket = socket
        self.connections += 1
        if self.away:
            socket.close(code=1012)
        socket.on_message(lambda message: self._hear(socket, json.loads(message)))

    def _hear(self, socket: Any, message: dict[str, Any]) -> None:
        if message["type"] == "hello":
            socket.send(json.dumps({"type": "ready", "models": self.MODELS, "schedulers": ["Euler", "DDIM"]}))
        elif message["type"] == "stop":
            self.stops.append(message["slot"])
        elif message["type"] == "draw":
            self.draws.append(message)
            if not self.mute:
                self.answer(message)

    def answer(self, asked: dict[str, Any], kind: str = "picture", side: int | None = None) -> None:
        """side: of its picture in pixels, if it is not as it was asked for"""
        file = io.BytesIO()
        Image.new("RGB", (side or asked["img_width"], side or asked["img_height"])).save(file, "JPEG")
        head = {
            "type": kind, "index": 1, "total": 4, "id": asked["id"], "slot": asked["slot"], "seed": asked["seed"], "media": "image/jpeg",
            "width": asked["img_width"], "height": asked["img_height"], "steps": asked["num_inference_steps"],
            "scheduler": asked.get("scheduler", "LCM"), "seconds": {"draw": 0.01},
            "adjusted": self.adjusted,
        }  # fmt: skip
        self.socket.send(binary(head, file.getvalue()))


HELD = """window.held = []; window.alive = new Set();
    const decode = HTMLImageElement.prototype.decode, make = URL.createObjectURL, free = URL.revokeObjectURL;
    HTMLImageElement.prototype.decode = async function () {
        await decode.call(this);
        if (window.hold) await new Promise((done) => held.push(done)); };
    URL.createObjectURL = (blob) => { const url = make(blob); alive.add(url); return url; };
    URL.revokeObjectURL = (url) => { alive.delete(url); free(url); };"""


@pytest.fixture
def invented(tmp_path: Path, page_of: Open) -> Any:
    """The made-up server, and a page that talks to it; .page"""
    with running(tmp_path) as server:
        invented = Invented()

        def before(page: Any) -> None:
            invented.lay(page)
            page.add_init_script(HELD)

        invented.page = page_of(server, before=before)
        invented.page.wait_for_selector(READY)
        yield invented
        invented.page.context.close()


def wishes(draw: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in draw.items() if name != "id"}


def test_the_history_brings_every_setting_back(invented: Any) -> None:
    page = invented.page
    page.select_option("#model", "guided")
    for name, value in {"seed": "42", "steps": "9", "guidance": "3.5", "negative": "blurred"}.items():
        page.fill(f"#{name}", value)
    page.select_option("#size", "192x128")
    page.select_option("#scheduler", "DDIM")
    drawn(page, lambda: page.fill("#prompt", "a red house"))
    first = invented.draws[-1]
    assert wishes(first) == {
        "type": "draw", "slot": "a", "previews": "auto", "model": "guided", "prompt": "a red house", "seed": 42,
        "num_inference_steps": 9, "guidance_scale": 3.5, "img_width": 192, "img_height": 128, "scheduler": "DDIM",
        "negative_prompt": "blurred",
    }  # fmt: skip
    page.wait_for_selector("#history li")
    page.fill("#negative", "")
    page.select_option("#model", "quick")  # with its own steps, guidance and size
    page.select_option("#scheduler", "")
    page.fill("#seed", "1")
    drawn(page, lambda: page.fill("#prompt", "a star"))
    second = invented.draws[-1]
    assert (second["model"], second["num_inference_steps"], second["guidance_scale"]) == ("quick", 4, 0)
    star = "#history button[title='a star, seed 1']"
    page.wait_for_selector(star)
    drawn(page, lambda: page.click("#history li:last-child button"))
    assert wishes(invented.draws[-1]) == wishes(first)
    assert [page.inner_text(f"#{name}-out") for name in ("steps", "guidance")] == ["9", "3.5"]
    drawn(page, lambda: page.click(star))
    assert wishes(invented.draws[-1]) == wishes(second)
    assert page.input_value("#negative") == ""


def test_the_model_is_remembered_as_long_as_there_is_such_a_one(invented: Any) -> None:
    page = invented.page
    for remembered, steps in (("guided", "20"), ("quick", "4")):
        page.select_option("#model", remembered)
        page.reload()
        page.wait_for_selector(READY)
        assert (page.input_value("#model"), page.input_value("#steps")) == (remembered, steps)
    page.evaluate("localStorage.setItem('model', 'one that was taken away')")
    page.reload()
    page.wait_for_selector(READY)
    assert (page.input_value("#model"), page.input_value("#steps")) == ("quick", "4")


def test_a_prompt_that_was_cut_off_is_said_with_its_picture(invented: Any) -> None:
    page, caption = invented.page, "LCM, 4 steps, seed 7, 128 × 128"
    invented.adjusted = ["prompt cut off after 75 tokens"]
    got = drawn(page, lambda: page.fill("#prompt", "a red house, and so on"))
    assert got["caption"] == f"{caption}, prompt cut off after 75 tokens"
    said = "() => document.querySelector('#said').textContent === 'Picture drawn, prompt cut off after 75 tokens'"
    page.wait_for_function(said)
    invented.adjusted = []
    assert drawn(page, lambda: page.fill("#prompt", "a red house"))["caption"] == caption


def test_a_negative_prompt_can_be_typed_where_it_counts(invented: Any) -> None:
    page = invented.page
    assert page.is_disabled("#negative") and page.locator("#chips button").count() == 4
    page.select_option("#model", "guided")
    assert page.is_enabled("#negative")
    page.fill("#guidance", "1")
    page.wait_for_selector("#negative:disabled")


def test_a_picture_is_asked_for_once_and_stopped_once(invented: Any) -> None:
    page = invented.page
    page.fill("#prompt", "a star")
    page.focus("#prompt")
    wait_until(lambda: page.evaluate("0") == 0 and len(invented.draws) == 1)
    page.evaluate("""() => {
        document.querySelector('#prompt').dispatchEvent(new Event('input', { bubbles: true }));
        document.querySelector('#prompt').dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' })); }""")
    page.wait_for_timeout(300)
    assert len(invented.draws) == 2  # Enter has drawn what was typed just before; it is not asked for again
    page.wait_for_selector(READY)
    page.fill("#prompt", "")
    page.wait_for_timeout(300)
    assert invented.stops == []  # it is here already
    invented.mute = True
    page.fill("#prompt", "a moon")
    wait_until(lambda: page.evaluate("0") == 0 and len(invented.draws) == 3)
    page.press("#prompt", "Escape")
    page.press("#prompt", "Escape")
    page.wait_for_timeout(100)
    assert (invented.stops, page.inner_text("#status")) == (["a"], "Stopped")
    invented.answer(invented.draws[-1])  # on its way already
    page.wait_for_timeout(300)
    assert page.inner_text("#status") == "Stopped" and page.get_attribute("#frame-a img", "alt") == "a star"


def test_only_the_last_request_counts(invented: Any) -> None:
    page = invented.page
    invented.mute = True
    for count, text in enumerate(("a star", "a moon"), 1):
        page.fill("#prompt", text)
        wait_until(lambda count=count: page.evaluate("0") == 0 and len(invented.draws) == count)
    old, new = invented.draws
    invented.answer(old)
    page.wait_for_timeout(300)
    assert (page.is_visible("#frame-a img"), page.inner_text("#status")) == (False, "Drawing…")
    drawn(page, lambda: invented.answer(new))
    assert page.get_attribute("#frame-a img", "alt") == "a moon"


def test_fast_typing_is_no_more_than_a_request_each_50_ms(invented: Any) -> None:
    elapsed_ms = invented.page.evaluate("""async () => {
        const since = performance.now(), prompt = document.querySelector('#prompt');
        for (let i = 0; i < 30; i++) {
            prompt.value = `star ${i}`;
            prompt.dispatchEvent(new Event('input', { bubbles: true }));
            await new Promise((done) => setTimeout(done, 5)); }
        return performance.now() - since; }""")
    wait_until(
        lambda: invented.page.evaluate("0") == 0 and invented.draws[-1:] and invented.draws[-1]["prompt"] == "star 29"
    )
    assert 2 <= len(invented.draws) <= 3 + elapsed_ms / 50


def test_of_two_compared_the_first_is_kept_and_each_is_announced_anew(invented: Any) -> None:
    page = invented.page
    page.select_option("#compare", "seed")
    drawn(page, lambda: page.fill("#prompt", "a star"))
    page.wait_for_function("() => document.querySelector('#said').textContent === 'Picture drawn'")
    page.wait_for_timeout(1000)
    assert page.locator("#history li").count() == 1
    invented.mute = True
    page.fill("#prompt", "a moon")
    page.wait_for_selector('#status[data-state="drawing"]')
    assert page.text_content("#said") == ""


def test_what_is_decoded_too_late_is_neither_shown_nor_kept(invented: Any) -> None:
    page = invented.page
    invented.mute = True
    page.evaluate("window.hold = true")

    def ask(text: str) -> dict[str, Any]:
        count = len(invented.draws) + 1
        page.fill("#prompt", text)
        wait_until(lambda: page.evaluate("0") == 0 and len(invented.draws) == count)
        return dict(invented.draws[-1])

    asked = ask("a star")
    invented.answer(asked, "preview", 32)
    invented.answer(asked)
    page.wait_for_function("() => held.length === 2")
    drawn(page, lambda: page.evaluate("held[1](), held[0]()"))  # the preview is ready after its picture
    assert page.evaluate("document.querySelector('#frame-a img').naturalWidth") == 128
    assert page.evaluate("[...alive].join()") == page.get_attribute("#frame-a img", "src")
    invented.answer(ask("a moon"))
    page.wait_for_function("() => held.length === 3")
    page.press("#prompt", "Escape")
    page.evaluate("held[2]()")
    page.wait_for_timeout(200)
    assert (page.get_attribute("#frame-a img", "alt"), page.inner_text("#status")) == ("a star", "Stopped")
    assert page.evaluate("[...alive].join()") == page.get_attribute("#frame-a img", "src")


def test_the_end_of_an_old_connection_is_no_end_of_the_new_one(invented: Any) -> None:
    page, old = invented.page, invented.socket
    old.on_close(lambda code, reason: None)  # a browser waits for the other side, for minutes where the network is gone
    page.evaluate("dispatchEvent(new Event('offline')); dispatchEvent(new Event('online'))")
    page.wait_for_selector(READY)
    old.close()
    page.wait_for_timeout(300)
    assert (invented.connections, page.inner_text("#status")) == (2, "Ready")
    drawn(page, lambda: page.fill("#prompt", "a star"))


def test_a_server_that_was_away_for_long_is_found_again_within_seconds(tmp_path: Path, page_of: Open) -> None:
    invented = Invented()

    def before(page: Any) -> None:
        page.clock.install(time=0)
        page.clock.pause_at(1)
        invented.lay(page)

    with running(tmp_path) as server:
        page = page_of(server, before=before)
        page.wait_for_selector(READY)
        invented.away = True
        invented.socket.close(code=1012)
        page.wait_for_selector('#status[data-state="lost"]')
        for _ in range(60):
            page.clock.run_for(1000)
            page.wait_for_timeout(20)
        assert page.inner_text("#status") == LOST and 10 < invented.connections < 25
        page.fill("#prompt", "a star")
        page.clock.run_for(100)
        assert page.inner_text("#status") == LOST  # not "Drawing…"
        invented.away = False
        for _ in range(6):
            page.clock.run_for(1000)
            page.wait_for_timeout(20)
        wait_until(lambda: page.evaluate("0") == 0 and [asked["prompt"] for asked in invented.draws] == ["a star"])
        # its picture is shown with a frame of the clock
        wait_until(lambda: page.clock.run_for(20) or page.query_selector(READY))
        page.context.close()


def test_behind_a_proxy_that_speaks_https_under_a_path(browser: Any) -> None:
    context = browser.new_context()
    page, connected, faults = context.new_page(), [], []
    folder = Path(serve.__file__).parent / "page"
    page.on("pageerror", lambda error: faults.append(str(error)))

    def file(route: Any) -> None:
        name = route.request.url.split("?")[0].rpartition("/")[2]
        route.fulfill(path=folder / (name or "index.html"))

    def connect(socket: Any) -> None:
        connected.append(socket.url)
        Invented()._connect(socket)

    page.route("https://pictures.example/**", file)
    page.route_web_socket(re.compile("/live"), connect)
    page.goto("https://pictures.example/draw/?steps=6#there")
    page.wait_for_function("() => document.querySelector('#steps').value === '6'")
    assert (connected, faults) == (["wss://pictures.example/draw/live"], [])
    context.close()


def test_what_a_browser_saves_or_drags_is_a_jpeg(tmp_path: Path, page_of: Open) -> None:
    script = """window.types = []; const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { types.push(blob.type); return make(blob); };"""
    with running(tmp_path) as server:
        page = page_of(server, before=lambda page: page.add_init_script(script))
        page.wait_for_selector(READY)
        page.select_option("#previews", "on")
        drawn(page, lambda: page.fill("#prompt", "a star"))
        assert len(page.evaluate("types")) > 1 and set(page.evaluate("types")) == {"image/jpeg"}
        page.context.close()


def test_a_key_is_kept_until_the_tab_is_closed(tmp_path: Path, page_of: Open) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file) as server:
        page = page_of(server)
        page.wait_for_selector("#key-dialog[open]")
        assert page.inner_text("#key-fault") == ""
        page.evaluate("dispatchEvent(new Event('offline'))")  # there was no connection any more
        assert page.inner_text("#status") == "A key is needed"
        page.fill("#key", f"  {key} ")
        page.keyboard.press("Enter")
        page.wait_for_selector(READY)
        page.reload()
        page.wait_for_selector(READY)
        assert page.evaluate("[localStorage.getItem('key'), sessionStorage.getItem('key')]") == [None, key]
        page.context.close()
